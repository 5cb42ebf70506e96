"""AdamW with a learning rate for each part, and its schedule."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from nanovlm.training.optim.adamw import LeanAdamW, moment_bytes
from nanovlm.training.settings import Settings

PARTS = ("projector", "language_model", "vision_encoder")  # of VisionLanguageModel
AFTER_BLOCKS = ("norm", "resampler", "lm_head")  # what a tower may have after its last block


@dataclass(frozen=True)
class Layer:
    """What learns at one depth of a part. `depth` counts blocks from the output: 0 is the last block and what follows."""

    part: str
    depth: int
    parameters: list[nn.Parameter]


def learning_layers(model: nn.Module) -> list[Layer]:
    """What is_trainable, by part and depth, the output's end first. A tied embedding is a first layer here, not a head."""
    layers = []
    for part in PARTS:
        module = getattr(model, part)
        by_depth: dict[int, list[nn.Parameter]] = {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                by_depth.setdefault(_depth(name, len(getattr(module, "blocks", ()))), []).append(
                    parameter
                )
        layers += [Layer(part, depth, by_depth[depth]) for depth in sorted(by_depth)]
    return layers


def _depth(name: str, blocks: int) -> int:
    """Blocks between a parameter and the output of its part; what stands before the first block is one deeper than it."""
    first, *rest = name.split(".")
    if first == "blocks":
        return blocks - 1 - int(rest[0])
    return 0 if first in AFTER_BLOCKS else blocks


def build_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over what learns: matrices decay; norms, biases and other vectors do not.

    With `layer_decay` a block learns slower the further it stands from the output of its part (Clark et al. 2020).
    """
    groups: dict[tuple, dict] = {}
    for layer in learning_layers(model):
        rate = settings.peak_lr(layer.part) * settings.layer_decay**layer.depth
        for parameter in layer.parameters:
            decays = parameter.dim() >= 2
            group = groups.setdefault(
                (layer.part, rate, decays),
                {
                    "params": [],
                    "part": layer.part,
                    "peak_lr": rate,
                    "lr": 0.0,
                    "weight_decay": settings.weight_decay if decays else 0.0,
                },
            )
            group["params"].append(parameter)
    betas = (0.9, settings.beta2)
    on_mps = any(
        parameter.device.type == "mps" for group in groups.values() for parameter in group["params"]
    )
    if (
        settings.optimizer == "adamw" and not settings.stochastic_rounding and not on_mps
    ):  # whose kernel ignores `found_inf`
        return torch.optim.AdamW(list(groups.values()), betas=betas, fused=True)
    return LeanAdamW(
        list(groups.values()),
        betas=betas,
        eight_bit=settings.optimizer == "adamw8bit",
        stochastic_rounding=settings.stochastic_rounding,
    )


def state_bytes(parameter: nn.Parameter, settings: Settings) -> int:
    """Bytes that the optimizer keeps for one parameter: two moments, in fp32 or in 8 bits, and the count of its steps."""
    return moment_bytes(parameter, settings.optimizer == "adamw8bit") + 4


def schedule(step: int, total: int, warmup: float, min_lr: float) -> float:
    """The learning rate of optimizer step `step` (from 0) as a share of its peak: linear warm-up, then a cosine."""
    warmup_steps = max(1, round(warmup * total))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total - warmup_steps)
    return min_lr + (1 - min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def set_learning_rates(optimizer: torch.optim.Optimizer, share_of_peak: float) -> None:
    """Apply the schedule to every group."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share_of_peak
