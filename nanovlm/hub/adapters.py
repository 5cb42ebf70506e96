"""Adapter folders, and the tensors of a model with its adapters merged."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from nanovlm.errors import NanoVLMError
from nanovlm.hub.config_json import explain_folder
from nanovlm.hub.loading import Checkpoint, open_checkpoint
from nanovlm.hub.names import refuse_old_names
from nanovlm.hub.safetensors import Deferred, save_file
from nanovlm.model.lora import LoRAConfig, LoRALinear, add_adapters, plain_weight
from nanovlm.model.quantization import QuantizedLinear
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.utils.config import from_dict
from nanovlm.utils.files import read_json, write_json

ADAPTER_FILE, CONFIG_FILE = "adapter.safetensors", "adapter.json"


def save_adapter(model: VisionLanguageModel, folder: Path, config: LoRAConfig) -> None:
    """Write what the base model lacks: the trainable parameters, and the projector in any case."""
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
    """Add the adapters of `folder` to `model`, and fill the tensors that `save_adapter` wrote.

    `model` has to be the one that they were trained on. Raises NanoVLMError for tensors that are
    missing, that have no place in the model or have another shape there.
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).exists():
        inner = folder / "adapter"
        of_run = f"is the folder of a run; give its adapter, {inner}"
        other = explain_folder(folder, f"no {CONFIG_FILE}")
        raise NanoVLMError(f"{folder}: {of_run if (inner / CONFIG_FILE).exists() else other}")
    config = from_dict(LoRAConfig, read_json(folder / CONFIG_FILE), where=str(folder / CONFIG_FILE))
    stored = open_checkpoint(folder / ADAPTER_FILE)
    refuse_old_names(stored.keys(), stored.path)
    add_adapters(model.language_model, config)
    parameters = dict(model.named_parameters())
    _check_fit(stored, parameters, config.base_model)
    for name in stored.keys():
        parameters[name].copy_(stored.tensor(name))


def _check_fit(stored: Checkpoint, parameters: Mapping[str, Tensor], base_model: str) -> None:
    advice = f"the adapter belongs to {base_model or 'another model'}"
    needed = {
        name
        for name in parameters
        if name.startswith("projector.") or name.endswith((".lora_A", ".lora_B"))
    }
    for name in sorted(needed | set(stored.keys())):
        if name not in stored.keys():
            raise NanoVLMError(f"{stored.path}: lacks {name}; {advice}")
        if name not in parameters:
            raise NanoVLMError(
                f"{stored.path}: holds {name}, for which the model has no place; {advice}"
            )
        shape = tuple(parameters[name].shape)
        if stored.shape(name) != shape:
            raise NanoVLMError(
                f"{stored.path}: {name} has shape {stored.shape(name)}, in the model {shape}; "
                f"{advice}"
            )


def merged_tensors(model: nn.Module, dtype: torch.dtype) -> dict[str, Deferred]:
    """The state dict of `model` with adapters merged and quantised matrices decoded.

    Each tensor is computed in fp32 and cast to `dtype` only when it is written. The model stays as
    it is.
    """
    tensors: dict[str, Deferred] = {}
    for path, module in model.named_modules():
        # A layer inside an adapter (`.base`) takes the adapter's name. The adapter comes first and
        # gives the weight; the layer then adds only its bias.
        path = path.removesuffix(".base")
        if isinstance(module, LoRALinear | QuantizedLinear):
            layer = module.base if isinstance(module, LoRALinear) else module
            shape = layer.out_features, layer.in_features
            weight = Deferred(shape, dtype, partial(plain_weight, module))
            tensors.setdefault(f"{path}.weight", weight)
        if not isinstance(module, LoRALinear):
            for name, parameter in module.named_parameters(recurse=False):
                tensor = Deferred(tuple(parameter.shape), dtype, parameter.detach)
                tensors.setdefault(f"{path}.{name}", tensor)
    return tensors
