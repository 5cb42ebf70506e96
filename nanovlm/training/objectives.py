"""What a run minimises: sums that the loop adds up over the batches of a step, and what it divides them by."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovlm.data.preferences import PairBatch
from nanovlm.inputs.batch import Batch
from nanovlm.model.loss import token_log_probabilities
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.settings import Settings


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


class DPO:
    """The objective of preference training; its sums are over pairs (`objective.py`).

    `label_smoothing` is the probability that a pair's labels are swapped (conservative DPO, Mitchell 2023), and
    `sft_weight` that of the chosen answer's cross entropy, per token, which is added.
    """

    measures = ("accuracy", "margin", "chosen_reward", "rejected_reward")

    def __init__(self, settings: Settings) -> None:
        self.beta, self.label_smoothing, self.sft_weight = (
            settings.beta,
            settings.label_smoothing,
            settings.sft_weight,
        )

    def count(self, batch: Batch) -> int:
        return len(PairBatch.of(batch).lengths) // 2

    def __call__(self, model: VisionLanguageModel, batch: Batch) -> Tensor:
        """Sums over the batch's pairs, (5,): loss, pairs of which the chosen answer has the larger reward, margins between
        the rewards, and both rewards."""
        batch = PairBatch.of(batch)
        log_probabilities = answer_log_probabilities(model, batch)  # (P, 2)
        rewards = self.beta * (log_probabilities - batch.reference)
        margins = rewards[:, 0] - rewards[:, 1]
        losses = -(1 - self.label_smoothing) * F.logsigmoid(
            margins
        ) - self.label_smoothing * F.logsigmoid(-margins)
        if self.sft_weight:
            losses = losses - self.sft_weight * log_probabilities[:, 0] / batch.lengths[::2]
        told = torch.stack(
            ((margins > 0).to(margins), margins, rewards[:, 0], rewards[:, 1])
        ).detach()
        return torch.cat((losses[None], told)).sum(dim=1)


def objective_of(settings: Settings) -> Objective:
    """What a run with these settings minimises."""
    return DPO(settings) if settings.objective == "dpo" else CrossEntropy()


def answer_log_probabilities(model: VisionLanguageModel, batch: PairBatch) -> Tensor:
    """The log-probability of each answer as a whole, its end-of-turn token included: (P, 2), chosen and rejected."""
    tokens = model(batch, token_log_probabilities)  # (M,)
    number = torch.arange(len(batch.lengths), device=tokens.device)
    answer_of = number.repeat_interleave(batch.lengths, output_size=len(tokens))
    # A sum over a masked square: unlike `index_add` it takes one order on every device, so runs come out the same.
    return (
        torch.where(answer_of == number[:, None], tokens, 0.0).sum(dim=1).view(len(number) // 2, 2)
    )
