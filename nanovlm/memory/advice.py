"""What makes a training step fit a GPU: flags to add, the least costly first."""

import dataclasses
from typing import Any

import torch

from nanovlm.memory.predict import Prediction, predict
from nanovlm.memory.shapes import batch_shape
from nanovlm.model.vlm import VLMConfig
from nanovlm.training.precision import Precision
from nanovlm.training.settings import Settings
from nanovlm.utils.device import DTYPES

LOW_RANKS = (64, 32, 16)  # of adapters, as a last resort
GIGABYTE = 1.0732e9  # bytes of what is sold as a GB of a card's memory; the rest is its driver's
CONTEXT = 0.6e9  # bytes of the CUDA context, with the libraries' kernels and workspaces
FRAGMENTATION = 1.05  # what the allocator reserves for each byte that tensors take


def on_gpu(settings: Settings) -> Precision:
    """How a run computes on a GPU, whether this machine has one or not."""
    dtype = DTYPES.get(settings.dtype, torch.bfloat16)
    return Precision(dtype, torch.device("cuda"), settings.stochastic_rounding)


def needed(peak: float) -> float:
    """Bytes of a card that a step with this peak needs.

    5 % more than the peak, because of holes between tensors that no other tensor fits into, and
    0.6 GB for the CUDA context, which lies outside of what PyTorch counts.
    """
    return FRAGMENTATION * peak + CONTEXT


def fits(prediction: Prediction, gigabytes: float) -> bool:
    """Whether a step fits a card that is sold with so many GB of memory."""
    return needed(prediction.peak) <= gigabytes * GIGABYTE


def advice(
    config: VLMConfig, settings: Settings, tokens: int, prediction: Prediction, gigabytes: float
) -> str:
    """Whether the step fits and, if not, what to change, each flag on top of those before it.

    `tokens`: see `batch_shape`.
    """
    card = (
        f"a GPU of {gigabytes:g} GB: with its context and the allocator's holes the step needs "
        f"{needed(prediction.peak) / 1e9:.2f} of {gigabytes * GIGABYTE / 1e9:.2f} GB"
    )
    if fits(prediction, gigabytes):
        return f"fits {card}"
    peak, fit = prediction.peak, False
    lines = [f"does not fit {card}; peak with, one after the other:"]
    for flags, changes in _changes(settings):
        if all(getattr(settings, name) == value for name, value in changes.items()):
            continue
        changed = dataclasses.replace(settings, **changes)
        shape = batch_shape(config, changed, tokens)
        lower = predict(config, changed, shape, on_gpu(changed), 0)
        if lower.peak > 0.99 * peak:  # more batches a step also need memory for the gradients' sum
            continue
        settings, peak = changed, lower.peak
        mark = "  ← the first that fits" if fits(lower, gigabytes) and not fit else ""
        fit = fit or bool(mark)
        lines.append(f"  {flags:58}{peak / 1e9:8.2f} GB{mark}")
    if not fit:
        lines.append("  nothing of this fits; take a smaller model or shorter rows")
    return "\n".join(lines)


def _changes(settings: Settings) -> list[tuple[str, dict[str, Any]]]:
    """Flags and the settings they stand for; empty settings: nothing to change.

    First come those that cost little time, last those that change the result.
    """
    trains_text = "language_model" in settings.trained_parts
    accumulate = settings.accumulate * settings.batch_size
    bfloat16 = {"dtype": "bfloat16"} if settings.dtype == "float32" else {}
    rounding: dict[str, Any] = {}
    if settings.dtype != "float16":
        rounding = {"stochastic_rounding": True, "dtype": "bfloat16"}
    changes: list[tuple[str, dict[str, Any]]] = [
        ("--dtype bfloat16", bfloat16),
        ("--checkpointing", {"checkpointing": True}),
        (f"--batch-size 1 --accumulate {accumulate}", {"batch_size": 1, "accumulate": accumulate}),
        ("--optimizer adamw8bit", {"optimizer": "adamw8bit"}),
        ("--stochastic-rounding", rounding),
    ]
    if settings.language_model_shape:  # trained from scratch: there is nothing yet to adapt
        return changes
    rank = settings.lora_rank or 64
    nf4 = "--quantize nf4" + " --lora-rank 64" * (trains_text and not settings.lora_rank)
    adapters = {"lora_rank": rank} if trains_text else {}
    changes += [("--lora-rank 64", adapters), (nf4, {"quantize": "nf4", **adapters})]
    for low in LOW_RANKS:
        changes.append((f"--lora-rank {low}", {"lora_rank": min(rank, low)} if trains_text else {}))
    return changes
