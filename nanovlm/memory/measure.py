"""The memory that training steps of given shapes really take, in a process of their own."""

import subprocess
import sys

import torch
from torch import nn

from nanovlm.chat import ChatConfig
from nanovlm.decoder import DecoderConfig
from nanovlm.device import peak_memory
from nanovlm.errors import NanoVLMError
from nanovlm.image import ImageConfig
from nanovlm.memory.shapes import Work, prepared
from nanovlm.projector import ProjectorConfig
from nanovlm.training.blocks import checkpoint_blocks
from nanovlm.training.optimizer import build_optimizer
from nanovlm.training.precision import Precision
from nanovlm.training.settings import Settings
from nanovlm.vit import VisionConfig
from nanovlm.vlm import VisionLanguageModel, VLMConfig


def random_model(config: VLMConfig, settings: Settings, precision: Precision) -> VisionLanguageModel:
    """A model with random weights, each made in the number format and on the device where a run holds it."""
    model = prepared(config, settings, precision).to_empty(device=precision.device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
        for buffer in model.buffers():  # quantised matrices: any bits are a matrix
            buffer.zero_()
    if settings.checkpointing:
        checkpoint_blocks(model, dropout=settings.lora_dropout > 0 or config.text.dropout > 0)
    return model.train()


def take_steps(model: VisionLanguageModel, work: Work, settings: Settings, precision: Precision, steps: int = 2) -> None:
    """Steps as the training loop takes them, each of `settings.accumulate` batches."""
    optimizer = build_optimizer(model, settings)
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for _ in range(steps):
        for _ in range(settings.accumulate):
            batch = work.batch(model.config, model.image_length, precision.dtype if settings.cache_features else None)
            with precision.autocast():
                loss = model(batch.to(precision.device))
            precision.scaled(loss / work.targets).backward()
        nn.utils.clip_grad_norm_(learning, settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def program_bytes(precision: Precision) -> int:
    """What a process holds without a model: Python, PyTorch, and the code of the kernels that a step calls. A step of a
    model of a few kilobytes brings all of it in. On CUDA none of it is the allocator's."""
    if precision.device.type == "cuda":
        return 0
    settings = Settings(train="projector,text,vision")
    config = VLMConfig(VisionConfig(16, 32, 2, 2, image_size=28), DecoderConfig(64, 16, 32, 2, 2, 1, 8), ProjectorConfig(),
                       ImageConfig(28, 28), ChatConfig())
    small = Precision(precision.dtype, precision.device)
    take_steps(random_model(config, settings, small), Work(rows=1, length=8, images=1, targets=2), settings, small)
    return peak_memory(precision.device)


def measured_apart(arguments: list[str]) -> int:
    """The peak of this command run once more with `arguments`, in a process of its own."""
    child = subprocess.run([sys.executable, "-m", "nanovlm.memory", *arguments], stdout=subprocess.PIPE, text=True)
    if child.returncode:
        raise NanoVLMError(f"the process that measures ended with code {child.returncode}; see above")
    return int(child.stdout)
