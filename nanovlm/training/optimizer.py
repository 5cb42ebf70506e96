"""AdamW with a learning rate for each part, and its schedule."""

import math

import torch
from torch import nn

from nanovlm.training.settings import Settings

# Names of settings for the attributes of VisionLanguageModel.
PARTS = {"projector": "projector", "text": "decoder", "vision": "vision"}


def freeze(model: nn.Module, trained_parts: tuple[str, ...]) -> None:
    """Let exactly the named parts learn. The eyes' final norm learns with them."""
    for part, attribute in PARTS.items():
        getattr(model, attribute).requires_grad_(part in trained_parts)


def build_optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) over what learns: matrices decay; norms, biases and other vectors do not."""
    groups = []
    for part, attribute in PARTS.items():
        parameters = [parameter for parameter in getattr(model, attribute).parameters() if parameter.requires_grad]
        for decays in (True, False):
            members = [parameter for parameter in parameters if (parameter.dim() >= 2) == decays]
            if members:
                groups.append({"params": members, "part": part, "peak_lr": settings.peak_lr(part), "lr": 0.0,
                               "weight_decay": settings.weight_decay if decays else 0.0})
    return torch.optim.AdamW(groups, betas=(0.9, settings.beta2), fused=True)


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
