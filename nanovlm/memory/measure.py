"""The memory that training steps of given shapes really take, in a process of their own."""

import json
import subprocess
import sys
from typing import Any

import torch
from torch import nn

from nanovlm.errors import NanoVLMError
from nanovlm.inputs.chat import ChatConfig
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.memory.shapes import Work, prepared
from nanovlm.model.language_model import LanguageModelConfig
from nanovlm.model.projector import ProjectorConfig
from nanovlm.model.vision_encoder import VisionEncoderConfig
from nanovlm.model.vlm import VisionLanguageModel, VLMConfig
from nanovlm.training.blocks import checkpoint_blocks
from nanovlm.training.objectives import objective_of
from nanovlm.training.optim.optimizer import build_optimizer
from nanovlm.training.precision import Precision
from nanovlm.training.settings import Settings
from nanovlm.utils.device import peak_memory

PATTERN = 1_000_003  # random numbers that weights repeat; a prime, so that no two rows of a matrix are the same


def random_model(
    config: VLMConfig, settings: Settings, precision: Precision
) -> VisionLanguageModel:
    """A model with random weights, each made in the number format and on the device where a run holds it."""
    model = filled(prepared(config, settings, precision), precision.device)
    if settings.checkpointing:
        checkpoint_blocks(
            model, dropout=settings.lora_dropout > 0 or config.language_model.dropout > 0
        )
    return model.train()


@torch.no_grad()
def filled(model: VisionLanguageModel, device: torch.device) -> VisionLanguageModel:
    """`model`, laid out without memory, with random weights on `device`: a million numbers over and over, which takes
    seconds where a billion of them would take minutes. Nothing is left unwritten, so all of it is in memory."""
    model.to_empty(device=device)
    pattern = torch.randn(PATTERN) * 0.02
    for parameter in model.parameters():
        pattern = pattern.to(device, parameter.dtype)
        flat = parameter.view(-1)
        for start in range(0, len(flat), PATTERN):
            part = flat[start : start + PATTERN]
            part.copy_(pattern[: len(part)])
    for buffer in model.buffers():  # quantised matrices: any bits are a matrix
        buffer.zero_()
    return model


def take_steps(
    model: VisionLanguageModel, work: Work, settings: Settings, precision: Precision, steps: int = 2
) -> None:
    """Steps as the training loop takes them, each of `settings.accumulate` batches."""
    objective = objective_of(settings)
    optimizer = build_optimizer(model, settings)
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for _ in range(steps):
        for _ in range(settings.accumulate):
            batch = work.batch(
                model.config,
                model.image_length,
                precision.dtype if settings.cache_features else None,
            )
            with precision.autocast():
                loss, _ = objective(model, batch.to(precision.device))
            precision.scaled(loss / objective.count_targets(batch)).backward()
        nn.utils.clip_grad_norm_(learning, settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def program_bytes(precision: Precision) -> int:
    """What a process holds without a model: Python, PyTorch, and the code of the kernels that a step calls. A step of a
    model of a few kilobytes brings all of it in. On CUDA none of it is the allocator's."""
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
    small = Precision(precision.dtype, precision.device)
    take_steps(
        random_model(config, settings, small),
        Work(rows=1, length=8, images=1, targets=2),
        settings,
        small,
    )
    return peak_memory(precision.device)


def measured_apart(arguments: list[str]) -> Any:
    """What this command prints when it is run once more with `arguments`, in a process of its own."""
    child = subprocess.run(
        [sys.executable, "-m", "nanovlm.memory", *arguments], stdout=subprocess.PIPE, text=True
    )
    if child.returncode:
        raise NanoVLMError(
            f"the process that measures ended with code {child.returncode}; see above"
        )
    return json.loads(child.stdout)
