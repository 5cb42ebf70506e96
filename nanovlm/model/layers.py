"""The small layers of both transformers: norms, MLPs with their activations, position tables.

Lessons: lessons/source/03_vision_transformer.py, lessons/source/06_language_model.py.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _RMSNorm(torch.autograd.Function):
    """The formula of `RMSNorm` in fp32; saves only its input and one number a vector."""

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
        projection = (grad * normalised).mean(dim=-1, keepdim=True)
        grad_input = (grad - normalised * projection) * scale
        return grad_input.to(hidden_states.dtype), grad_weight, None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang & Sennrich 2019).

    The result has the dtype of the input. Under autocast on CUDA, PyTorch's own would give fp32.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(…, C) → (…, C)."""
        weight = self.weight.to(hidden_states.dtype)
        device = hidden_states.device.type
        if device == "cpu":  # PyTorch has no kernel here: in bf16 8 times as slow
            return _RMSNorm.apply(hidden_states, weight, self.eps)
        with torch.autocast(device, enabled=False):
            return F.rms_norm(hidden_states, weight.shape, weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation (Ba et al. 2016) in the dtype of its input.

    Under autocast, PyTorch's own would give fp32.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(…, C) → (…, C)."""
        weight, bias = self.weight.to(hidden_states.dtype), self.bias.to(hidden_states.dtype)
        with torch.autocast(hidden_states.device.type, enabled=False):
            return F.layer_norm(hidden_states, self.normalized_shape, weight, bias, self.eps)


NORMS: dict[str, Callable[[int, float], nn.Module]] = {"rms": RMSNorm, "layer": LayerNorm}


def _identity(hidden_states: Tensor) -> Tensor:
    return hidden_states


def _quick_gelu(hidden_states: Tensor) -> Tensor:
    return hidden_states * torch.sigmoid(1.702 * hidden_states)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # by the names of published configs
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
    "silu": F.silu,
    "linear": _identity,
}


class _GatedProduct(torch.autograd.Function):
    """silu(gate) · value; saves only its inputs: the backward pass computes silu(gate) again."""

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
        return self.down_proj(F.silu(gate, inplace=True).mul_(value))


class PlainMLP(nn.Module):
    """Linear, GELU, linear: GPT-2's MLP (Radford et al. 2019), with the exact GELU."""

    def __init__(self, width: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(…, C) → (…, C)."""
        return self.down_proj(F.gelu(self.up_proj(hidden_states)))


MLPS: dict[str, Callable[[int, int, bool], nn.Module]] = {"gated": GatedMLP, "gelu": PlainMLP}


class Reducer(nn.Module):
    """Wide embeddings → the model's width through a narrow middle, for words and visual tokens."""

    def __init__(self, wide: int, narrow: int, width: int, eps: float) -> None:
        super().__init__()
        self.down = nn.Linear(wide, narrow)
        self.up = nn.Linear(narrow, width)
        self.norm = LayerNorm(width, eps)

    def forward(self, embeddings: Tensor) -> Tensor:
        """(B, T, C_embedding) → (B, T, C)."""
        return self.norm(self.up(F.gelu(self.down(embeddings))))


def _linear(distance: Tensor) -> Tensor:
    return (1 - distance).clamp(min=0)


def _cubic(distance: Tensor, a: float) -> Tensor:
    """Cubic convolution (Keys 1981); `a` is its slope at distance 1."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


FILTERS: dict[str, Callable[[Tensor], Tensor]] = {  # weights by distance, with PyTorch's constants
    "bicubic": partial(_cubic, a=-0.75),
    "bicubic_antialias": partial(_cubic, a=-0.5),
    "bilinear_antialias": _linear,
}


def interpolation_weights(
    size: int, new_size: int, mode: str, device: torch.device | str | None = None
) -> Tensor:
    """What each of `size` cells in a line adds to each of `new_size`: (new_size, size) in fp32.

    `mode` is a name of FILTERS. With antialiasing, the filter is widened to a new cell where cells
    get fewer, and its weights beyond the edge are left out; without it, the cells at the edge are
    repeated beyond it. Rows add up to 1.
    """
    antialias = mode.endswith("_antialias")
    ratio, margin = size / new_size, 0 if antialias else 2
    centres = (torch.arange(new_size, device=device) + 0.5) * ratio
    cells = torch.arange(-margin, size + margin, device=device)
    distance = (cells + 0.5 - centres[:, None]).abs() / (max(ratio, 1) if antialias else 1)
    weights = FILTERS[mode](distance)  # (new_size, size + 2 · margin)
    if antialias:
        return weights / weights.sum(dim=1, keepdim=True)
    weights[:, margin] += weights[:, :margin].sum(dim=1)
    weights[:, -margin - 1] += weights[:, -margin:].sum(dim=1)
    return weights[:, margin:-margin]


def resize_grid(grid: Tensor, rows: int, columns: int, mode: str) -> Tensor:
    """(N, old rows, old columns, C) → (N, rows · columns, C) in fp32; `mode` a name of FILTERS.

    The same numbers as those of `F.interpolate`, as two matrix products: their gradients exist on
    every device and are the same in every run, which `F.interpolate` does not promise.
    """
    _, old_rows, old_columns, width = grid.shape
    for_rows = interpolation_weights(old_rows, rows, mode, grid.device)
    for_columns = interpolation_weights(old_columns, columns, mode, grid.device)
    with torch.autocast(grid.device.type, enabled=False):
        grid = for_columns @ grid.float()  # (N, old rows, columns, C)
        return (for_rows @ grid.flatten(2)).reshape(-1, rows * columns, width)


def resize_positions(
    table: Tensor, side: int, rows: int, columns: int, mode: str = "bicubic"
) -> Tensor:
    """Resize a position table of a side × side grid: (1, side², C) → (1, rows · columns, C).

    `mode` is "bicubic", "bicubic_antialias" (a larger filter where the grid shrinks), or "nearest":
    each place takes the vector of the place that its upper left corner falls into.
    """
    if (rows, columns) == (side, side):
        return table
    grid = table.unflatten(1, (side, side))  # (1, side, side, C)
    if mode == "nearest":  # whole numbers: with fractions, rounding would choose between two places
        row, column = (torch.arange(n, device=table.device) * side // n for n in (rows, columns))
        return grid[:, row[:, None], column].flatten(1, 2)
    # In fp32: bicubic in half precision shifts the table.
    return resize_grid(grid, rows, columns, mode).to(table.dtype)


def sine_cosine_positions(
    side: int, width: int, device: torch.device | str | None = None
) -> Tensor:
    """Fixed positions of a side × side grid: (1, side², width) in fp32.

    Sines and cosines as in Vaswani et al. 2017, in two dimensions. The first half of a vector
    encodes the column, the second the row; each half holds the sines at width / 4 frequencies, then
    the cosines. `width` is a multiple of 4.
    """
    exponents = -torch.arange(width // 4, device=device, dtype=torch.float32) / (width // 4)
    angles = torch.arange(side, device=device)[:, None] * 10000**exponents  # (side, width / 4)
    codes = torch.cat((angles.sin(), angles.cos()), dim=-1)  # (side, width / 2)
    columns = codes[None].expand(side, -1, -1)  # [row, column] → codes[column]
    rows = codes[:, None].expand(-1, side, -1)  # [row, column] → codes[row]
    return torch.cat((columns, rows), dim=-1).flatten(0, 1)[None]
