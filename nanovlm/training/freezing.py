"""What learns: which parts, how deep, how fast; and what that costs in memory."""

import torch
from torch import nn

from nanovlm.errors import NanoVLMError
from nanovlm.model.lora import adapter_parameters
from nanovlm.model.quantization import QuantizedLinear
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.optim.optimizer import AFTER_BLOCKS, PARTS, state_bytes
from nanovlm.training.settings import Settings


def freeze(model: VisionLanguageModel, settings: Settings) -> None:
    """Let exactly what `settings` name learn.

    The top blocks of a tower learn with the norm and the resampler after them, and of the decoder with an output head of
    its own. With LoRA the decoder's own tensors are frozen and adapters learn in their place (`lora.py`), at any depth
    given. With the word embeddings learns all between them and the first block: a reducer, a table of positions.
    """
    decoder, vision = model.language_model, model.vision_encoder
    for name, layers, blocks in (
        ("language_model", settings.language_model_layers, decoder.blocks),
        ("vision_encoder", settings.vision_encoder_layers, vision.blocks),
    ):
        if layers > len(blocks):
            raise NanoVLMError(
                f"--{name.replace('_', '-')}-layers is {layers} and there are {len(blocks)} blocks; give at most as many"
            )
        if layers and name not in settings.trained_parts:
            raise NanoVLMError(
                f"--{name.replace('_', '-')}-layers {layers} says how deep {name} is_trainable, but --train does not name {name}"
            )
    model.requires_grad_(False)
    for part in PARTS:
        if part in settings.trained_parts:
            getattr(model, part).requires_grad_(True)
    for layers, tower in (
        (settings.language_model_layers, decoder),
        (settings.vision_encoder_layers, vision),
    ):
        if layers:
            above = [
                *tower.blocks[-layers:],
                *(getattr(tower, name) for name in AFTER_BLOCKS if hasattr(tower, name)),
            ]
            tower.requires_grad_(False)
            for module in above:
                module.requires_grad_(True)
    if settings.lora_rank:
        decoder.requires_grad_(False)
        for parameter in adapter_parameters(decoder):
            parameter.requires_grad_(True)
    if settings.language_model_embedding:
        for name in ("embed_tokens", "reducer", "position_embedding"):  # the words' way in
            if hasattr(decoder, name):
                getattr(decoder, name).requires_grad_(True)


def is_trainable(module: nn.Module) -> bool:
    """Whether anything in `module` does."""
    return any(parameter.requires_grad for parameter in module.parameters())


def describe(model: VisionLanguageModel, settings: Settings) -> str:
    """A table: for each part its parameters, those that learn, their rate, and the bytes of weights, gradients and
    optimizer state."""
    lines = [
        f"{'part':16}{'parameters':>13}{'learn':>13}{'rate':>9}{'weights':>11}{'gradients':>11}{'optimizer':>11}"
    ]
    totals = [0.0] * 5
    for part in PARTS:
        module = getattr(model, part)
        parameters, buffers = list(module.parameters()), list(module.buffers())
        quantized = sum(
            layer.in_features * layer.out_features
            for layer in module.modules()
            if isinstance(layer, QuantizedLinear)
        )
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        row = [
            sum(map(torch.numel, parameters)) + quantized,
            sum(map(torch.numel, learning)),
            sum(tensor.nbytes for tensor in parameters + buffers),
            sum(tensor.nbytes for tensor in learning),
            sum(state_bytes(tensor, settings) for tensor in learning),
        ]
        totals = [total + value for total, value in zip(totals, row)]
        lines.append(_line(part, f"{settings.peak_lr(part):.0e}" if learning else "—", row))
    return "\n".join([*lines, _line("together", "", totals)])


def _line(part: str, rate: str, row: list[float]) -> str:
    counts = "".join(f"{value / 1e6:12.2f}M" for value in row[:2])
    return f"{part:16}{counts}{rate:>9}" + "".join(f"{value / 1e6:8.1f} MB" for value in row[2:])
