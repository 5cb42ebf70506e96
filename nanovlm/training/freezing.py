"""What learns: which parts, how deep, how fast; and what that costs in memory."""

import torch
from torch import nn

from nanovlm.errors import NanoVLMError
from nanovlm.training.lora import adapter_parameters
from nanovlm.training.optimizer import AFTER_BLOCKS, PARTS, state_bytes
from nanovlm.training.quantization import QuantizedLinear
from nanovlm.training.settings import Settings
from nanovlm.vlm import VisionLanguageModel


def freeze(model: VisionLanguageModel, settings: Settings) -> None:
    """Let exactly what `settings` name learn.

    The top blocks of a tower learn with the norm and the resampler after them, and of the decoder with an output head of
    its own. With LoRA the decoder's own tensors are frozen and adapters learn in their place (`lora.py`), at any depth
    given. With the word embeddings learns all between them and the first block: a reducer, a table of positions.
    """
    decoder, vision = model.decoder, model.vision
    for name, layers, blocks in (
        ("text", settings.text_layers, decoder.blocks),
        ("vision", settings.vision_layers, vision.blocks),
    ):
        if layers > len(blocks):
            raise NanoVLMError(
                f"--{name}-layers is {layers} and there are {len(blocks)} blocks; give at most as many"
            )
        if layers and name not in settings.trained_parts:
            raise NanoVLMError(
                f"--{name}-layers {layers} says how deep {name} learns, but --train does not name {name}"
            )
    model.requires_grad_(False)
    for part, attribute in PARTS.items():
        if part in settings.trained_parts:
            getattr(model, attribute).requires_grad_(True)
    for layers, tower in ((settings.text_layers, decoder), (settings.vision_layers, vision)):
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
    if settings.text_embedding:
        for name in ("embed_tokens", "reducer", "position_embedding"):  # the words' way in
            if hasattr(decoder, name):
                getattr(decoder, name).requires_grad_(True)


def learns(module: nn.Module) -> bool:
    """Whether anything in `module` does."""
    return any(parameter.requires_grad for parameter in module.parameters())


def describe(model: VisionLanguageModel, settings: Settings) -> str:
    """A table: for each part its parameters, those that learn, their rate, and the bytes of weights, gradients and
    optimizer state."""
    lines = [
        f"{'part':12}{'parameters':>13}{'learn':>13}{'rate':>9}{'weights':>11}{'gradients':>11}{'optimizer':>11}"
    ]
    totals = [0.0] * 5
    for part, attribute in PARTS.items():
        module = getattr(model, attribute)
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
    return f"{part:12}{counts}{rate:>9}" + "".join(f"{value / 1e6:8.1f} MB" for value in row[2:])
