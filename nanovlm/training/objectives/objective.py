"""What a run minimises, and the usual one: the cross entropy of answers.

An objective gives sums over a batch. The training loop adds them over the batches of a step, and
over processes, and divides them by the number of targets in the whole step.
"""

from typing import Protocol

from torch import Tensor

from nanovlm.data.words import Vocabulary
from nanovlm.inputs.batch import Batch
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.objectives.preferences import DPO
from nanovlm.training.objectives.words import Words
from nanovlm.training.settings import ObjectiveSettings


class Objective(Protocol):
    """What the training loop uses of an objective. Nothing in it waits for the device."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        """What it measures besides the loss."""
        ...

    def count_targets(self, batch: Batch) -> int:
        """The number of targets in a batch: labelled tokens, pairs, or images."""
        ...

    def __call__(self, model: VisionLanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sums over the batch's targets in fp32: the loss, (), and the metrics, (metrics,)."""
        ...


class CrossEntropy:
    """Supervised fine-tuning: the cross entropy of the labelled tokens, which are its targets."""

    metric_names = ()

    def count_targets(self, batch: Batch) -> int:
        return len(batch.targets)

    def __call__(self, model: VisionLanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
        loss = model(batch)
        return loss, loss.new_zeros(0)


def objective_of(
    settings: ObjectiveSettings, model: VisionLanguageModel, vocabulary: Vocabulary
) -> Objective:
    """The objective that the settings name; `vocabulary` are the words to learn, if it does."""
    if settings.objective == "words":
        return Words.of(model, vocabulary)
    if settings.objective == "dpo":
        return DPO(settings.beta, settings.label_smoothing, settings.sft_weight)
    return CrossEntropy()
