"""What a run minimises: sums that the loop adds up over a step's batches, and what it divides them by."""

from typing import Protocol

from torch import Tensor

from nanovlm.vlm import Batch, VisionLanguageModel


class Objective(Protocol):
    """What the loop knows of an objective. Nothing in it waits for the device."""

    measures: tuple[str, ...]  # the names of what it tells beside the loss

    def count(self, batch: Batch) -> int:
        """How many things the sums are over, of which a run minimises the mean."""

    def __call__(self, model: VisionLanguageModel, batch: Batch) -> Tensor:
        """The sums over a batch, (1 + measures,) in fp32: first the loss, alone with a gradient."""


class CrossEntropy:
    """Supervised fine-tuning: the cross entropy of labelled tokens, and their number."""

    measures: tuple[str, ...] = ()

    def count(self, batch: Batch) -> int:
        return len(batch.targets)

    def __call__(self, model: VisionLanguageModel, batch: Batch) -> Tensor:
        return model(batch)[None]
