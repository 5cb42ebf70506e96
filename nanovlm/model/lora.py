"""LoRA (Hu et al. 2021): small trainable matrices beside frozen ones, and merged into them."""

import difflib
import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.errors import NanoVLMError
from nanovlm.model.language_model import LanguageModel
from nanovlm.model.quantization import QuantizedLinear
from nanovlm.utils.config import check_numbers


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers have adapters, and of what shape."""

    rank: int
    alpha: float
    targets: str  # ends or patterns of layer names, with commas, such as q_proj,v_proj
    dropout: float = 0.0
    layers: int = 0  # top blocks that have adapters; 0: all
    base_model: str = ""  # the model that they were trained on

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.dropout >= 1:
            raise NanoVLMError(f"LoRAConfig: dropout is {self.dropout}; it has to be below 1")


class LoRALinear(nn.Module):
    """base(x) + alpha/rank · B A dropout(x): `base` is frozen, A and B are trainable.

    A is (rank, in) and B (out, rank). B starts at zero, so the first forward pass gives what `base`
    alone gives.
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
    """The matrix that a layer stands for, (out, in) in fp32: of an adapter W + alpha/rank · B A."""
    if isinstance(layer, LoRALinear):
        up, down = layer.lora_B.float(), layer.lora_A.float()
        return plain_weight(layer.base).addmm(up, down, alpha=layer.scale)
    if isinstance(layer, QuantizedLinear):
        return layer.dequantize(torch.float32)
    return layer.weight.float()


def add_adapters(model: LanguageModel, config: LoRAConfig) -> None:
    """Wrap the linear layers that `config` names, in the top blocks that it names, in place."""
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise NanoVLMError(
            "the model has LoRA adapters already; merge them before others are added"
        )
    names = [  # without routers, which do more than multiply
        f"blocks.{number}.{name}"
        for number in range(len(model.blocks))[-config.layers :]  # [-0:] is all of them
        for name, module in model.blocks[number].named_modules()
        if type(module) is nn.Linear or isinstance(module, QuantizedLinear)
    ]
    chosen: set[str] = set()
    for target in filter(None, map(str.strip, config.targets.split(","))):
        matching = {
            name for name in names if fnmatchcase(name, target) or name.endswith(f".{target}")
        }
        if not matching:
            known = dict.fromkeys([*(name.rpartition(".")[2] for name in names), *names])
            near = difflib.get_close_matches(target, known, n=1, cutoff=0.0)
            raise NanoVLMError(
                f"--lora-targets: no layer of the language model is {target!r}; "
                f"the nearest is {near[0]!r}"
            )
        chosen |= matching
    if not chosen:
        raise NanoVLMError("--lora-targets names no layer; name some, such as q_proj,v_proj")
    for name in sorted(chosen):
        base = model.get_submodule(name)
        assert isinstance(base, (nn.Linear, QuantizedLinear))
        _replace(model, name, LoRALinear(base, config))


def adapter_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The A and B of every adapter inside `module`."""
    adapters = [child for child in module.modules() if isinstance(child, LoRALinear)]
    return [parameter for adapter in adapters for parameter in (adapter.lora_A, adapter.lora_B)]


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Replace each layer that has an adapter by a plain one that computes the same.

    It has the dtype of the adapter's base.
    """
    for name, adapter in list(model.named_modules()):
        if not isinstance(adapter, LoRALinear):
            continue
        base = adapter.base
        with torch.device("meta"):
            merged = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
        dtype = base.dtype if isinstance(base, QuantizedLinear) else base.weight.dtype
        merged.weight = nn.Parameter(plain_weight(adapter).to(dtype))
        merged.register_parameter("bias", base.bias)
        _replace(model, name, merged.train(adapter.training))


def _replace(module: nn.Module, name: str, child: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(parent), attribute, child)
