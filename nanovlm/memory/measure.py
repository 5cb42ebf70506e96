"""The memory that training steps of given shapes take, measured in a process of their own."""

from collections.abc import Callable

import torch
from torch import nn

from nanovlm.inputs.chat import ChatConfig
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.memory.shapes import any_words, prepared, random_batch
from nanovlm.model.language_model import LanguageModelConfig
from nanovlm.model.projector import ProjectorConfig
from nanovlm.model.vision_encoder import VisionEncoderConfig
from nanovlm.model.vlm import VisionLanguageModel, VLMConfig
from nanovlm.training.blocks import checkpoint_blocks
from nanovlm.training.monitor.walk import BatchShape
from nanovlm.training.objectives.objective import objective_of
from nanovlm.training.optim.adamw import LeanAdamW
from nanovlm.training.optim.optimizer import FusedAdamW, build_optimizer
from nanovlm.training.precision import Precision
from nanovlm.training.settings import Settings
from nanovlm.utils.device import peak_memory

# Weights repeat so many random numbers; a prime, so that no two rows of a matrix are the same.
PATTERN = 1_000_003


def random_model(
    config: VLMConfig, settings: Settings, precision: Precision
) -> VisionLanguageModel:
    """A model with random weights, each in the dtype and on the device that a run holds it in."""
    model = filled(prepared(config, settings, precision), precision.device)
    if settings.checkpointing:
        dropout = settings.lora_dropout > 0 or config.language_model.dropout > 0
        checkpoint_blocks(model, dropout=dropout)
    return model.train()


@torch.no_grad()
def filled(model: VisionLanguageModel, device: torch.device) -> VisionLanguageModel:
    """Give `model`, which is on the meta device, random weights on `device`.

    They are the same million numbers over and over, since a billion would take minutes. All memory
    is written to, so that all of it is resident.
    """
    model.to_empty(device=device)
    pattern = torch.randn(PATTERN) * 0.02
    for parameter in model.parameters():
        pattern = pattern.to(device, parameter.dtype)
        flat = parameter.view(-1)
        for start in range(0, len(flat), PATTERN):
            part = flat[start : start + PATTERN]
            part.copy_(pattern[: len(part)])
    for buffer in model.buffers():  # of quantised matrices, where any bits are valid
        buffer.zero_()
    return model


def take_steps(
    model: VisionLanguageModel,
    shape: BatchShape,
    settings: Settings,
    precision: Precision,
    steps: int = 2,
) -> None:
    """Steps as the training loop takes them, each of `settings.accumulate` batches of `shape`."""
    optimizer = build_optimizer(model, settings)
    for _ in range(steps):
        take_step(model, optimizer, shape, settings, precision)


def take_step(
    model: VisionLanguageModel,
    optimizer: FusedAdamW | LeanAdamW,
    shape: BatchShape,
    settings: Settings,
    precision: Precision,
    begin: Callable[[str], None] = lambda moment: None,
) -> None:
    """One step. `begin` is told when a moment of it begins."""
    objective = objective_of(settings, model, any_words(model, settings))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for _ in range(settings.accumulate):
        begin("loading")
        batch = random_batch(model, shape, precision.dtype).to(precision.device)
        begin("vision encoder")
        with precision.autocast():
            loss, _ = objective(model, batch)
        begin("backward")
        precision.scaled(loss / objective.count_targets(batch)).backward()
    begin("update")
    norm = nn.utils.clip_grad_norm_(parameters, settings.clip)
    optimizer.found_inf = (~torch.isfinite(loss.detach() + norm)).float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def program_bytes(precision: Precision) -> int:
    """What a process holds without a model: Python, PyTorch, and the code of a step's kernels.

    A step of a tiny model loads all of it. On CUDA the allocator holds none of it.
    """
    if precision.device.type == "cuda":
        return 0
    settings = Settings(train="projector,language_model,vision_encoder")
    config = VLMConfig(
        VisionEncoderConfig(16, 32, 2, 2, image_size=28),
        LanguageModelConfig(64, 16, 32, 2, 2, 1, 8),
        ProjectorConfig(),
        ImageConfig(28, 28),
        ChatConfig(),
    )
    shape = BatchShape(rows=1, length=8, images=1, targets=2)
    plain = Precision(precision.dtype, precision.device)
    take_steps(random_model(config, settings, plain), shape, settings, plain)
    return peak_memory(precision.device)
