"""LoRA (Hu et al. 2021): small matrices that learn beside frozen ones, and can be merged into them.

run/adapter/adapter.safetensors   the adapters, the projector, and whatever else learned
run/adapter/adapter.json          rank, alpha, targets, and the model they belong to
"""

import dataclasses
import difflib
import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.config import from_dict
from nanovlm.decoder import Decoder
from nanovlm.errors import NanoVLMError
from nanovlm.files import read_json, write_json
from nanovlm.training.quantization import QuantizedLinear
from nanovlm.training.settings import Settings
from nanovlm.vlm import VisionLanguageModel
from nanovlm.weights.loading import open_checkpoint
from nanovlm.weights.safetensors import Deferred, save_file

ADAPTER_FILE, CONFIG_FILE = "adapter.safetensors", "adapter.json"


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers have adapters, and of what shape. `targets` are names as `--lora-targets` takes them, `layers` the
    top blocks that have any (0: all), `base_model` what they learned on."""

    rank: int
    alpha: float
    targets: str
    dropout: float = 0.0
    layers: int = 0
    base_model: str = ""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise NanoVLMError(f"the rank of a LoRA adapter is {self.rank}; it has to be 1 or more")

    @classmethod
    def from_settings(cls, settings: Settings) -> "LoRAConfig":
        base = settings.init or f"{settings.vision} + {settings.text}"
        return cls(
            settings.lora_rank,
            settings.lora_alpha or 2.0 * settings.lora_rank,
            settings.lora_targets,
            settings.lora_dropout,
            settings.text_layers,
            base,
        )


class LoRALinear(nn.Module):
    """base(x) + alpha/rank · B A dropout(x): `base` is frozen and plain or quantised, A (rank, in) and B (out, rank) learn.

    B starts at zero, so that the first forward pass gives what `base` alone gives.
    """

    def __init__(self, base: nn.Linear | QuantizedLinear, config: LoRAConfig) -> None:
        super().__init__()
        device = next(tensor.device for tensor in (*base.parameters(), *base.buffers()))
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.empty(config.rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device))
        self.scale, self.dropout = config.alpha / config.rank, config.dropout
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # ±1/√in, as nn.Linear's own
        self.train(base.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features)."""
        down, up = self.lora_A.to(inputs.dtype), self.lora_B.to(inputs.dtype)
        narrow = F.linear(F.dropout(inputs, self.dropout, self.training), down)  # (…, rank)
        return self.base(inputs) + F.linear(narrow * self.scale, up)


@torch.no_grad()
def plain_weight(layer: nn.Linear | QuantizedLinear | LoRALinear) -> Tensor:
    """The one matrix that a layer multiplies by, (out, in) in fp32; of an adapter W + alpha/rank · B A."""
    if isinstance(layer, LoRALinear):
        return plain_weight(layer.base).addmm(
            layer.lora_B.float(), layer.lora_A.float(), alpha=layer.scale
        )
    return (
        layer.dequantize(torch.float32)
        if isinstance(layer, QuantizedLinear)
        else layer.weight.float()
    )


def add_adapters(decoder: Decoder, config: LoRAConfig) -> None:
    """Wrap the layers that `config` names, among those of the decoder's blocks, in place."""
    if any(isinstance(module, LoRALinear) for module in decoder.modules()):
        raise NanoVLMError(
            "the model has LoRA adapters already; merge them before others are added"
        )
    names = [
        f"blocks.{number}.{name}"
        for number in range(len(decoder.blocks))[-config.layers :]  # [-0:] are all
        for name, module in decoder.blocks[number].named_modules()
        if type(module) is nn.Linear or isinstance(module, QuantizedLinear)
    ]  # no router, which is more than its matrix
    chosen: set[str] = set()
    for target in filter(None, map(str.strip, config.targets.split(","))):
        matching = {
            name for name in names if fnmatchcase(name, target) or name.endswith(f".{target}")
        }
        if not matching:
            known = dict.fromkeys([*(name.rpartition(".")[2] for name in names), *names])
            near = difflib.get_close_matches(target, known, n=1, cutoff=0.0)
            raise NanoVLMError(
                f"--lora-targets: no layer of the decoder is {target!r}; the nearest is {near[0]!r}"
            )
        chosen |= matching
    if not chosen:
        raise NanoVLMError("--lora-targets names no layer; name some, such as q_proj,v_proj")
    for name in sorted(chosen):
        _replace(decoder, name, LoRALinear(decoder.get_submodule(name), config))


def adapter_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The A and B of every adapter inside `module`."""
    adapters = [child for child in module.modules() if isinstance(child, LoRALinear)]
    return [parameter for adapter in adapters for parameter in (adapter.lora_A, adapter.lora_B)]


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Put plain layers that compute the same in the place of all that have adapters, one by one, in their dtype."""
    for name in [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]:
        adapter = model.get_submodule(name)
        base = adapter.base
        with torch.device("meta"):
            merged = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
        dtype = base.dtype if isinstance(base, QuantizedLinear) else base.weight.dtype
        merged.weight, merged.bias = nn.Parameter(plain_weight(adapter).to(dtype)), base.bias
        _replace(model, name, merged.train(adapter.training))


def merged_tensors(model: nn.Module, dtype: torch.dtype) -> dict[str, Deferred]:
    """The state dict of `model` as a plain one, adapters merged and quantised matrices decoded: computed in fp32, cast
    to `dtype`, and each made only when it is written. The model stays as it is."""
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
    """Give `model`, the one they learned on, the adapters, projector and other tensors that `save_adapter` wrote.

    Raises NanoVLMError for tensors that are missing, have no place in the model or another shape there.
    """
    folder = Path(folder)
    config = from_dict(LoRAConfig, read_json(folder / CONFIG_FILE), where=str(folder / CONFIG_FILE))
    stored = open_checkpoint(folder / ADAPTER_FILE)
    add_adapters(model.decoder, config)
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


def _replace(module: nn.Module, name: str, child: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(parent), attribute, child)
