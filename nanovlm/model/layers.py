"""The small layers of both transformers: norms, MLPs with their activations, position tables."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _RMSNorm(torch.autograd.Function):
    """The formula of `RMSNorm`, in fp32. Only the input and one number a vector are kept; the rest is computed anew."""

    @staticmethod
    def forward(ctx, hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = hidden_states.float()
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
        ctx.save_for_backward(hidden_states, weight, scale)
        return (wide * scale).to(hidden_states.dtype) * weight

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden_states, weight, scale = ctx.saved_tensors
        normalised = hidden_states.float() * scale
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normalised).flatten(0, -2).sum(dim=0).to(weight.dtype)
        grad = (grad * weight).float()
        along = (grad * normalised).mean(dim=-1, keepdim=True)
        return ((grad - normalised * along) * scale).to(hidden_states.dtype), grad_weight, None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang & Sennrich 2019); any shape in, the same out."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight.to(hidden_states.dtype)
        if (
            hidden_states.device.type == "cpu"
        ):  # where PyTorch's has no kernel and in bf16 takes eight times as long
            return _RMSNorm.apply(hidden_states, weight, self.eps)
        return F.rms_norm(hidden_states, weight.shape, weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """Ba et al. 2016. What comes out has the dtype of what goes in, also under autocast, which would make it fp32."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight, bias = self.weight.to(hidden_states.dtype), self.bias.to(hidden_states.dtype)
        with torch.autocast(hidden_states.device.type, enabled=False):
            return F.layer_norm(hidden_states, self.normalized_shape, weight, bias, self.eps)


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


def resize_positions(
    table: Tensor, side: int, rows: int, columns: int, mode: str = "bicubic"
) -> Tensor:
    """A table for a grid of side × side places, (1, side², C), as one for rows × columns: (1, rows · columns, C).

    `mode` is "bicubic", "bicubic_antialias" (a larger filter where the grid shrinks), or "nearest": each place takes the
    vector of the one that its upper left corner falls in.
    """
    if (rows, columns) == (side, side):
        return table
    grid = table.unflatten(1, (side, side))  # (1, side, side, C)
    if (
        mode == "nearest"
    ):  # in whole numbers: where a corner falls between two places, fractions would choose at random
        down, across = (
            torch.arange(count, device=table.device) * side // count for count in (rows, columns)
        )
        return grid[:, down[:, None], across].flatten(1, 2)
    grid = grid.permute(0, 3, 1, 2).float()  # bicubic in half precision shifts the table
    grid = F.interpolate(
        grid, (rows, columns), mode="bicubic", antialias=mode == "bicubic_antialias"
    )
    return grid.flatten(2).transpose(1, 2).to(table.dtype)


def sine_cosine_positions(
    side: int, width: int, device: torch.device | str | None = None
) -> Tensor:
    """Fixed positions of a grid of side × side places (Vaswani et al. 2017, in two dimensions): (1, side², width) in fp32.

    The first half of a vector says the column, the second the row; each half is its number's sines at width / 4
    frequencies, then its cosines. `width` is a multiple of 4.
    """
    frequencies = 10000 ** (
        -torch.arange(width // 4, device=device, dtype=torch.float32) / (width // 4)
    )
    angles = torch.arange(side, device=device)[:, None] * frequencies  # (side, width / 4)
    numbers = torch.cat((angles.sin(), angles.cos()), dim=-1)  # (side, width / 2)
    across = numbers[None].expand(side, -1, -1)  # of a place in row i and column j, the j-th
    down = numbers[:, None].expand(-1, side, -1)
    return torch.cat((across, down), dim=-1).flatten(0, 1)[None]
