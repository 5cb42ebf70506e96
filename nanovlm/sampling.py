"""How the next token is chosen from its logits.

Lesson: lessons/source/10_generation.py.
"""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

from nanovlm.errors import NanoVLMError
from nanovlm.utils.config import check_numbers


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy: always the most likely token."""

    temperature: float = 0.0
    top_p: float = 1.0  # keep the likeliest tokens of this total probability (Holtzman et al. 2020)
    top_k: int = 0  # keep this many of the most likely tokens; 0 keeps all
    repetition_penalty: float = 1.0  # above 1, tokens so far get less likely (Keskar et al. 2019)
    seed: int = 0
    beams: int = 1  # above 1: beam search with so many beginnings of an answer
    length_penalty: float = 1.0  # of beam search; above 1, long answers gain (`Beams`)

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.beams > 1 and (self.temperature or self.top_k or self.top_p != 1):
            raise NanoVLMError(
                "beam search takes the likeliest answer and draws nothing; leave out beams, or "
                "temperature, top_p and top_k"
            )
        if self.beams == 1 and self.length_penalty != 1:
            raise NanoVLMError("length_penalty belongs to beam search; give beams of 2 or more")


def add_beam_flags(parser: argparse._ActionsContainer) -> None:
    """Give a parser, or a group of its flags, `--beams` and `--length-penalty`."""
    parser.add_argument(
        "--beams",
        type=int,
        default=1,
        metavar="N",
        help="beam search: write the N likeliest beginnings of an answer side by side "
        "(default: 1, without)",
    )
    parser.add_argument(
        "--length-penalty",
        type=float,
        default=1.0,
        metavar="L",
        help="with --beams: divide an answer's log probability by its length to the power L; "
        "above 1 longer answers, below 1 shorter ones (default: 1)",
    )


def sample(logits: Tensor, seen: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """(B, V) logits and the (B, T) ids so far → (B,) next tokens."""
    logits = penalise(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits, order = (logits / sampling.temperature).sort(dim=-1, descending=True)
    if sampling.top_k:
        logits[:, sampling.top_k :] = -torch.inf
    probabilities = logits.softmax(dim=-1)
    # A token goes when those before it already reach top_p, so the most likely one always stays.
    left_out = probabilities.cumsum(dim=-1) - probabilities >= sampling.top_p
    probabilities = probabilities.masked_fill(left_out, 0)
    # Of events with rates p_i, waiting E_i / p_i where E_i ~ Exp(1), the first is i with the
    # probability p_i. `torch.multinomial` does the same after a check that waits for the device.
    waiting_times = torch.empty_like(probabilities).exponential_(generator=generator)
    chosen = (probabilities / waiting_times).argmax(dim=-1, keepdim=True)
    return order.gather(1, chosen)[:, 0]


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the (B, T) ids so far less likely: (B, V) → (B, V)."""
    if penalty == 1:
        return logits
    values = logits.gather(1, seen)
    values = torch.where(values > 0, values / penalty, values * penalty)
    return logits.scatter(1, seen, values)
