"""Which parameters are trained, and a table of what each part of the model takes in memory.

Lesson: lessons/source/18_two_stages.py.
"""

import torch
from torch import nn

from nanovlm.errors import NanoVLMError
from nanovlm.model.lora import adapter_parameters
from nanovlm.model.quantization import QuantizedLinear
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.optim.optimizer import AFTER_BLOCKS, running_blocks, state_bytes
from nanovlm.training.settings import PARTS, OptimizerSettings, TrainableSettings
from nanovlm.utils.parser import flag

BEFORE_BLOCKS = ("embed_tokens", "reducer", "position_embedding")  # of the language model
COLUMNS = ("part", "parameters", "trainable", "rate", "weights", "gradients", "optimizer")


def freeze(model: VisionLanguageModel, settings: TrainableSettings) -> None:
    """Make exactly the parameters that `settings` name trainable.

    With the last blocks of the vision encoder its norm and its resampler are trained, with those of
    the language model its norm and an output head of its own; with the word embeddings all that
    stands before the first block. With LoRA the language model is frozen but for the adapters.
    What the vision encoder has above `vision_layer` does not run: it neither counts nor is trained.
    """
    _check_depths(model, settings)
    model.requires_grad_(False)
    for name in PARTS:
        if name in settings.trained_parts:
            for module in _last_blocks(model, name, getattr(settings, f"{name}_layers", 0)):
                module.requires_grad_(True)
    for module in _idle(model):
        module.requires_grad_(False)
    language_model = model.language_model
    if settings.lora_rank:
        language_model.requires_grad_(False)
        for parameter in adapter_parameters(language_model):
            parameter.requires_grad_(True)
    if settings.language_model_embedding:
        for name in BEFORE_BLOCKS:
            if hasattr(language_model, name):
                language_model.get_submodule(name).requires_grad_(True)


def is_trainable(module: nn.Module) -> bool:
    """Whether any parameter of `module` is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


def describe(model: VisionLanguageModel, settings: OptimizerSettings) -> str:
    """A table of parameters, learning rates, and megabytes of weights, gradients and optimizer."""
    lines = [_line(*COLUMNS)]
    totals = [0.0] * 5
    for part in PARTS:
        module = model.get_submodule(part)
        parameters, buffers = list(module.parameters()), list(module.buffers())
        quantized = sum(
            layer.in_features * layer.out_features
            for layer in module.modules()
            if isinstance(layer, QuantizedLinear)
        )
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        values: list[float] = [
            sum(map(torch.numel, parameters)) + quantized,
            sum(map(torch.numel, trainable)),
            sum(tensor.nbytes for tensor in parameters + buffers),
            sum(tensor.nbytes for tensor in trainable),
            sum(state_bytes(tensor, settings) for tensor in trainable),
        ]
        totals = [total + value for total, value in zip(totals, values)]
        lines.append(_values(part, f"{settings.peak_lr(part):.0e}" if trainable else "—", values))
    return "\n".join([*lines, _values("total", "", totals)])


def _check_depths(model: VisionLanguageModel, settings: TrainableSettings) -> None:
    for name in ("language_model", "vision_encoder"):
        layers, count = getattr(settings, f"{name}_layers"), running_blocks(model, name)
        given = f"{flag(name)}-layers"
        if layers > count:
            raise NanoVLMError(
                f"{given} is {layers} and there are {count} blocks"
                + (" below --vision-layer" if count < len(getattr(model, name).blocks) else "")
                + "; give at most as many"
            )
        if layers and name not in settings.trained_parts:
            raise NanoVLMError(
                f"{given} {layers} says how many blocks of {name} are trained, "
                f"but --train does not name {name}"
            )


def _last_blocks(model: VisionLanguageModel, name: str, count: int) -> list[nn.Module]:
    """The last `count` blocks of a part, with what stands after them; 0: all of the part."""
    part = model.get_submodule(name)
    if not count:
        return [part]
    blocks = [*part.get_submodule("blocks").children()][: running_blocks(model, name)]
    return blocks[-count:] + [getattr(part, each) for each in AFTER_BLOCKS if hasattr(part, each)]


def _idle(model: VisionLanguageModel) -> list[nn.Module]:
    """What the vision encoder has above the layer that the projector gets."""
    encoder, config = model.vision_encoder, model.config
    after = [getattr(encoder, name) for name in AFTER_BLOCKS if hasattr(encoder, name)]
    return [*encoder.blocks[config.vision_depth :], *([] if config.vision_norm else after)]


def _values(part: str, rate: str, values: list[float]) -> str:
    counts = [f"{value / 1e6:.2f}M" for value in values[:2]]
    return _line(part, *counts, rate, *(f"{value / 1e6:.1f} MB" for value in values[2:]))


def _line(part: str, *cells: str) -> str:
    widths = (13, 13, 9, 11, 11, 11)
    return f"{part:16}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths))
