"""AdamW with a learning rate for each part of the model, and the schedule of the rates.

Lessons: lessons/source/14_training_loop.py, lessons/source/18_two_stages.py.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.optim.adamw import LeanAdamW, moment_bytes
from nanovlm.training.settings import PARTS, OptimizerSettings

AFTER_BLOCKS = ("norm", "resampler", "lm_head")  # what a part may have after its last block


class FusedAdamW(torch.optim.AdamW):
    """PyTorch's own, in one kernel, which skips a step on the device where `found_inf` is 1."""

    found_inf: Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """The trainable parameters at one depth of a part.

    depth: blocks between them and the output; 0 is the last block and what follows it.
    """

    part: str
    depth: int
    parameters: list[nn.Parameter]


def running_blocks(model: VisionLanguageModel, part: str) -> int:
    """How many blocks of a part run; the vision encoder's are those below `vision_layer`."""
    if part == "vision_encoder":
        return model.config.vision_depth
    return len(getattr(model.get_submodule(part), "blocks", ()))


def trainable_layers(model: VisionLanguageModel) -> list[Layer]:
    """The trainable parameters by part and depth, beginning at the output.

    An embedding that is tied to the output head counts as the first layer.
    """
    layers = []
    for part in PARTS:
        module = model.get_submodule(part)
        blocks = running_blocks(model, part)
        by_depth: dict[int, list[nn.Parameter]] = {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                by_depth.setdefault(_depth(name, blocks), []).append(parameter)
        layers += [Layer(part, depth, by_depth[depth]) for depth in sorted(by_depth)]
    return layers


def _depth(name: str, blocks: int) -> int:
    """Blocks between a parameter and the output; what precedes the first block is one deeper."""
    first, *rest = name.split(".")
    if first == "blocks":
        return blocks - 1 - int(rest[0])
    return 0 if first in AFTER_BLOCKS else blocks


def build_optimizer(
    model: VisionLanguageModel, settings: OptimizerSettings
) -> FusedAdamW | LeanAdamW:
    """AdamW (Loshchilov & Hutter 2019) over the trainable parameters.

    Matrices decay; norms, biases and other vectors do not. With `layer_decay` the learning rate of
    a block falls with its distance from the output of its part (Clark et al. 2020).
    """
    groups: dict[tuple, dict] = {}
    for layer in trainable_layers(model):
        rate = settings.peak_lr(layer.part) * settings.layer_decay**layer.depth
        for parameter in layer.parameters:
            decay = settings.weight_decay if parameter.dim() >= 2 else 0.0
            new = {
                "params": [],
                "part": layer.part,
                "peak_lr": rate,
                "lr": 0.0,
                "weight_decay": decay,
            }
            group = groups.setdefault((layer.part, rate, parameter.dim() >= 2), new)
            group["params"].append(parameter)
    parameters = [parameter for group in groups.values() for parameter in group["params"]]
    betas = (0.9, settings.beta2)
    on_mps = any(parameter.device.type == "mps" for parameter in parameters)  # ignores `found_inf`
    if settings.optimizer == "adamw" and not settings.stochastic_rounding and not on_mps:
        return FusedAdamW(list(groups.values()), betas=betas, fused=True)
    return LeanAdamW(
        list(groups.values()),
        betas=betas,
        eight_bit=settings.optimizer == "adamw8bit",
        stochastic_rounding=settings.stochastic_rounding,
    )


def state_bytes(parameter: Tensor, settings: OptimizerSettings) -> int:
    """Bytes that the optimizer keeps for one parameter: two moments and a count of its steps."""
    return moment_bytes(parameter, settings.optimizer == "adamw8bit") + 4


def schedule(step: int, total: int, warmup: float, min_lr: float) -> float:
    """The learning rate of step `step` (from 0) as a share of its peak.

    Linear warm-up over a share `warmup` of the `total` steps, then a cosine down to `min_lr`.
    """
    warmup_steps = max(1, round(warmup * total))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total - warmup_steps)
    return min_lr + (1 - min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def set_learning_rates(optimizer: torch.optim.Optimizer, share_of_peak: float) -> None:
    """Apply the schedule to every group."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share_of_peak
