"""Preference training: of two answers, the preferred one becomes more probable than the other."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovlm.data.preferences import PairBatch
from nanovlm.inputs.batch import Batch
from nanovlm.model.loss import token_log_probabilities
from nanovlm.model.vlm import VisionLanguageModel


class DPO:
    """Direct preference optimization (Rafailov et al. 2023), whose targets are pairs of answers.

    beta: how strongly the model is held to the reference model.
    label_smoothing: probability that a pair's labels are swapped (Mitchell 2023).
    sft_weight: weight of the chosen answer's cross entropy per token, which is added to the loss.
    """

    metric_names = ("accuracy", "margin", "chosen_reward", "rejected_reward")

    def __init__(self, beta: float, label_smoothing: float = 0.0, sft_weight: float = 0.0) -> None:
        self.beta, self.label_smoothing, self.sft_weight = beta, label_smoothing, sft_weight

    def count_targets(self, batch: Batch) -> int:
        return len(PairBatch.of(batch).lengths) // 2

    def __call__(self, model: VisionLanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """Accuracy is the number of pairs whose chosen answer has the larger reward."""
        batch = PairBatch.of(batch)
        log_probabilities = answer_log_probabilities(model, batch)  # (P, 2)
        rewards = self.beta * (log_probabilities - batch.reference)
        chosen, rejected = rewards.unbind(dim=1)  # (P,) each
        margins = chosen - rejected
        kept, swapped = F.logsigmoid(margins), F.logsigmoid(-margins)
        losses = -(1 - self.label_smoothing) * kept - self.label_smoothing * swapped
        if self.sft_weight:
            losses = losses - self.sft_weight * log_probabilities[:, 0] / batch.lengths[::2]
        right = (margins > 0).to(margins)
        metrics = torch.stack((right, margins, chosen, rejected)).detach()
        sums = torch.cat((losses[None], metrics)).sum(dim=1)  # (1 + 4,)
        return sums[0], sums[1:].detach()


def answer_log_probabilities(model: VisionLanguageModel, batch: PairBatch) -> Tensor:
    """The log-probability of each answer, its end-of-turn token included.

    Returns (P, 2): chosen and rejected.
    """
    tokens = model(batch, token_log_probabilities)  # (M,)
    number = torch.arange(len(batch.lengths), device=tokens.device)  # (2P,)
    answer_of = number.repeat_interleave(batch.lengths, output_size=len(tokens))  # (M,)
    # Unlike `index_add`, a masked sum adds in the same order on every device and in every run.
    by_answer = torch.where(answer_of == number[:, None], tokens, 0.0)  # (2P, M)
    return by_answer.sum(dim=1).view(len(number) // 2, 2)
