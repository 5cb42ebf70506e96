"""Adapter folders, and a model with its adapters merged, as what is written to disk."""

import dataclasses
from functools import partial
from pathlib import Path

import torch
from torch import nn

from nanovlm.errors import NanoVLMError
from nanovlm.hub.loading import open_checkpoint
from nanovlm.hub.safetensors import Deferred, save_file
from nanovlm.model.lora import LoRAConfig, LoRALinear, add_adapters, plain_weight
from nanovlm.model.quantization import QuantizedLinear
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.utils.config import from_dict
from nanovlm.utils.files import read_json, write_json

ADAPTER_FILE, CONFIG_FILE = "adapter.safetensors", "adapter.json"


def merged_tensors(model: nn.Module, dtype: torch.dtype) -> dict[str, Deferred]:
    """The state dict of `model` as a plain one, adapters merged and quantised matrices decoded:
    computed in fp32, cast to `dtype`, and each made only when it is written. The model stays as it
    is."""
    tensors: dict[str, Deferred] = {}
    for path, module in model.named_modules():
        path = path.removesuffix(
            ".base"
        )  # what an adapter wraps bears the adapter's name; met second, it adds its bias
        if isinstance(module, (LoRALinear, QuantizedLinear)):
            layer = module.base if isinstance(module, LoRALinear) else module
            shape = layer.out_features, layer.in_features
            tensors.setdefault(
                f"{path}.weight", Deferred(shape, dtype, partial(plain_weight, module))
            )
        if not isinstance(module, LoRALinear):
            for name, parameter in module.named_parameters(recurse=False):
                shape = tuple(parameter.shape)
                tensors.setdefault(f"{path}.{name}", Deferred(shape, dtype, parameter.detach))
    return tensors


def save_adapter(model: VisionLanguageModel, folder: Path, config: LoRAConfig) -> None:
    """Write what a base model lacks: what learned, and the projector in any case."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG_FILE, dataclasses.asdict(config))
    tensors = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or name.startswith("projector.")
    }
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})


@torch.no_grad()
def load_adapter(model: VisionLanguageModel, folder: str | Path) -> None:
    """Give `model`, the one they learned on, the adapters, projector and other tensors that
    `save_adapter` wrote.

    Raises NanoVLMError for tensors that are missing, have no place in the model or another shape
    there.
    """
    folder = Path(folder)
    config = from_dict(LoRAConfig, read_json(folder / CONFIG_FILE), where=str(folder / CONFIG_FILE))
    stored = open_checkpoint(folder / ADAPTER_FILE)
    add_adapters(model.language_model, config)
    places = dict(model.named_parameters())
    needed = {
        name
        for name in places
        if name.startswith("projector.") or name.endswith((".lora_A", ".lora_B"))
    }
    advice = f"the adapter belongs to {config.base_model or 'another model'}"
    for name in sorted(needed | set(stored.keys())):
        if name not in stored.keys():
            raise NanoVLMError(f"{stored.path}: lacks {name}; {advice}")
        if name not in places:
            raise NanoVLMError(
                f"{stored.path}: holds {name}, for which the model has no place; {advice}"
            )
        if stored.shape(name) != tuple(places[name].shape):
            raise NanoVLMError(
                f"{stored.path}: {name} has shape {stored.shape(name)}, in the model "
                f"{tuple(places[name].shape)}; {advice}"
            )
    for name in stored.keys():
        places[name].copy_(stored.tensor(name))
