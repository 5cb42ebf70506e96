"""What makes a training step fit a GPU: flags to add, the least costly first."""

import dataclasses

import torch

from nanovlm.memory.predict import Prediction, predict
from nanovlm.memory.shapes import work_of
from nanovlm.model.vlm import VLMConfig
from nanovlm.training.precision import Precision
from nanovlm.training.settings import Settings
from nanovlm.utils.device import DTYPES

LOW_RANKS = (64, 16)  # of adapters, as a last resort


def on_gpu(settings: Settings) -> Precision:
    """How a run computes on a GPU of whatever machine: there may be none here."""
    return Precision(
        DTYPES.get(settings.dtype, torch.bfloat16),
        torch.device("cuda"),
        settings.stochastic_rounding,
    )


def advice(
    config: VLMConfig, settings: Settings, tokens: int, prediction: Prediction, gigabytes: float
) -> str:
    """Whether it fits and, if not, what to change, each on top of those before it. `tokens`: see `work_of`."""
    if prediction.peak <= gigabytes * 1e9:
        return f"fits {gigabytes:g} GB"
    peak, fits = prediction.peak, False
    lines = [f"does not fit {gigabytes:g} GB; with, one after the other:"]
    for flags, changes in _changes(settings):
        if all(getattr(settings, name) == value for name, value in changes.items()):
            continue
        changed = dataclasses.replace(settings, **changes)
        if (
            lower := predict(
                config, changed, work_of(config, changed, tokens), on_gpu(changed), 0
            ).peak
        ) > 0.99 * peak:
            continue  # several batches a step need room for the sum of their gradients
        settings, peak = changed, lower
        mark = "  ← the first that fits" if peak <= gigabytes * 1e9 and not fits else ""
        fits = fits or bool(mark)
        lines.append(f"  {flags:58}{peak / 1e9:8.2f} GB{mark}")
    return "\n".join(
        lines if fits else [*lines, "  nothing of this fits; take a smaller model or shorter rows"]
    )


def _changes(settings: Settings) -> list[tuple[str, dict]]:
    """Flags to say and the settings they are, by what they cost in time, then in exactness."""
    text = "language_model" in settings.trained_parts
    accumulate = settings.accumulate * settings.batch_size
    rounding = (
        {} if settings.dtype == "float16" else {"stochastic_rounding": True, "dtype": "bfloat16"}
    )
    rank = {"lora_rank": settings.lora_rank or 64} if text else {}
    changes = [
        ("--dtype bfloat16", {"dtype": "bfloat16"} if settings.dtype == "float32" else {}),
        ("--checkpointing", {"checkpointing": True}),
        (f"--batch-size 1 --accumulate {accumulate}", {"batch_size": 1, "accumulate": accumulate}),
        ("--optimizer adamw8bit", {"optimizer": "adamw8bit"}),
        ("--stochastic-rounding", rounding),
    ]
    if (
        settings.language_model_shape
    ):  # a decoder from scratch: there is nothing learned yet to hold on to
        return changes
    return changes + [
        ("--lora-rank 64", rank),
        (
            "--quantize nf4" + " --lora-rank 64" * (text and not settings.lora_rank),
            {"quantize": "nf4", **rank},
        ),
        *(
            (
                f"--lora-rank {low}",
                {"lora_rank": min(settings.lora_rank or 64, low)} if text else {},
            )
            for low in LOW_RANKS
        ),
    ]
