"""The MLP of a decoder's block, of either kind, and the activations of the other parts' MLPs."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _quick_gelu(hidden_states: Tensor) -> Tensor:
    return hidden_states * torch.sigmoid(1.702 * hidden_states)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # under the hub's names
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
    "silu": F.silu,
}


class _GatedProduct(torch.autograd.Function):
    """silu(gate) · value, of which only the two inputs are kept: silu(gate) is computed anew in the backward pass."""

    @staticmethod
    def forward(ctx, gate: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gate, value)
        return F.silu(gate).mul_(value)

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate, value = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * value, gate), F.silu(gate).mul_(grad)


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) · up(x))."""

    def __init__(self, width: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(…, C) → (…, C)."""
        gate, value = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        if gate.requires_grad or value.requires_grad:
            return self.down_proj(_GatedProduct.apply(gate, value))
        return self.down_proj(F.silu(gate, inplace=True).mul_(value))  # nobody needs the gate again


class PlainMLP(nn.Module):
    """Linear, GELU, linear: GPT-2's (Radford et al. 2019), with the exact GELU."""

    def __init__(self, width: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(…, C) → (…, C)."""
        return self.down_proj(F.gelu(self.up_proj(hidden_states)))


MLPS: dict[str, type[nn.Module]] = {"gated": GatedMLP, "gelu": PlainMLP}
