"""Frozen matrices in few bits: 4-bit NormalFloat with double quantisation, and int8.

NormalFloat is QLoRA's (Dettmers et al. 2023). Codes and scales are buffers outside the state dict:
a quantised model is never saved as such, `hub.adapters.merged_tensors` turns it into plain
matrices. fp32 numbers are stored as their bits, in int32, which `model.to(bfloat16)` does not
change.
"""

import functools
import statistics
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.utils.compiler import compiled_on_cuda, dynamic

BLOCK = 64  # weights of NF4 that share a scale
SCALE_BLOCK = 256  # scales of NF4 that share a scale of their own
AT_ONCE = 2**21  # weights decoded at a time, uncompiled: few enough to stay in a CPU's cache


class _QuantizedProduct(torch.autograd.Function):
    """inputs @ Wᵀ + b. Both passes decode the matrix: nothing of its size is kept between them."""

    @staticmethod
    def forward(ctx, inputs: Tensor, layer: "QuantizedLinear") -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(inputs.dtype)
        return F.linear(inputs, layer.dequantize(inputs.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad @ ctx.layer.dequantize(grad.dtype), None


class QuantizedLinear(nn.Module):
    """x Wᵀ + b in place of a frozen nn.Linear, with W in rows of codes and a scale for each row.

    (…, in_features) → (…, out_features), computed in autocast's dtype, or without autocast in that
    of the input. Only the input gets a gradient. A subclass sets `codes` and defines the rest of
    what decodes them.
    """

    codes: Tensor  # (R, bytes of a row)
    row: int  # weights of a row
    varying: tuple[int, ...] = (0,)  # dimensions of `codes` in which layers differ

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        self.bias = linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.train(linear.training)

    def operands(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What `scales` takes, and what `decode` takes beside codes and scales."""
        raise NotImplementedError

    @staticmethod
    def scales(*stored: Tensor) -> Tensor:
        """The scale of each row, (R or more,) in fp32."""
        raise NotImplementedError

    @staticmethod
    def decode(codes: Tensor, scales: Tensor, *tables: Tensor) -> Tensor:
        """Rows of codes and their scales, (r,) → their weights, (r, weights of a row) in fp32."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The matrix (out_features, in_features): computed in fp32, rounded to `dtype` once."""
        compiled = compiled_on_cuda(_decode, self.codes.device, "decoding quantized weights")
        rows = self._decode_at_once(compiled, dtype) if compiled else self._decode_in_parts(dtype)
        shape = self.out_features, self.in_features
        return rows.view(-1)[: shape[0] * shape[1]].view(shape)

    def _decode_in_parts(self, dtype: torch.dtype) -> Tensor:
        stored, tables = self.operands()
        rows = torch.empty(len(self.codes), self.row, dtype=dtype, device=self.codes.device)
        scales, step = self.scales(*stored)[: len(rows)], max(1, AT_ONCE // self.row)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            rows[part] = self.decode(self.codes[part], scales[part], *tables)
        return rows

    def _decode_at_once(self, compiled: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        # Outside these modes, each of which would ask for a compilation of its own.
        autocast = torch.autocast(self.codes.device.type, enabled=False)
        with torch.inference_mode(False), torch.no_grad(), autocast:
            stored, tables = self.operands()
            stored = [dynamic(tensor, 0) for tensor in stored]
            codes = dynamic(self.codes, *self.varying)
            return compiled(type(self), codes, stored, tables, dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features)."""
        if torch.is_autocast_enabled(inputs.device.type):
            inputs = inputs.to(torch.get_autocast_dtype(inputs.device.type))
        return _QuantizedProduct.apply(inputs, self)

    def _store(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            bits = tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor
            self.register_buffer(name, bits, persistent=False)


def _decode(
    kind: type[QuantizedLinear],
    codes: Tensor,
    stored: Sequence[Tensor],
    tables: Sequence[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """All rows of weights. Compiled, it is one kernel, which reads codes and writes weights."""
    return kind.decode(codes, kind.scales(*stored)[: len(codes)], *tables).to(dtype)


class NF4Linear(QuantizedLinear):
    """Each weight is the nearest of 16 levels times the largest magnitude of its block of 64.

    That is 4.13 bits a weight. Blocks follow the matrix row by row; the last one is padded with
    zeros. Two codes share a byte, the first in its high half. The scales of the blocks, minus their
    mean, are stored in 8 bits, in blocks of 256 with an fp32 scale each.
    """

    row = BLOCK
    scale_codes: Tensor
    scale_steps: Tensor
    scale_mean: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        blocks = _in_blocks(linear.weight.detach().float(), BLOCK)
        scales = blocks.abs().amax(dim=1)
        levels = nf4_levels().to(blocks.device)
        boundaries = (levels[1:] + levels[:-1]) / 2
        nearest = torch.bucketize(blocks / _divisor(scales), boundaries, out_int32=True)
        nearest = nearest.to(torch.uint8)
        mean = scales.mean()
        spread = _in_blocks(scales - mean, SCALE_BLOCK)
        steps = spread.abs().amax(dim=1) / 127
        self._store(
            codes=nearest[:, 0::2] << 4 | nearest[:, 1::2],
            scale_codes=(spread / _divisor(steps)).round().to(torch.int8),
            scale_steps=steps,
            scale_mean=mean,
        )

    def operands(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        steps, mean = (bits.view(torch.float32) for bits in (self.scale_steps, self.scale_mean))
        return (self.scale_codes, steps, mean), (_nf4_pairs(self.codes.device),)

    @staticmethod
    def scales(codes: Tensor, steps: Tensor, mean: Tensor) -> Tensor:
        return (codes.float() * steps[:, None] + mean).clamp_(min=0).view(-1)

    @staticmethod
    def decode(codes: Tensor, scales: Tensor, pairs: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            decoded = pairs[codes.int()]
        else:  # on a CPU one access of eight bytes takes a quarter of the time of two of four
            looked_up = pairs.view(torch.int64).view(-1).index_select(0, codes.reshape(-1).int())
            decoded = looked_up.view(torch.float32)
        return decoded.view(len(codes), BLOCK).mul_(scales[:, None])


class Int8Linear(QuantizedLinear):
    """Each weight is a whole number from −127 to 127 times its row's largest magnitude / 127."""

    varying = 0, 1
    steps: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.row = linear.in_features
        weight = linear.weight.detach().float()
        steps = weight.abs().amax(dim=1) / 127
        self._store(codes=(weight / _divisor(steps)).round().to(torch.int8), steps=steps)

    def operands(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return (self.steps.view(torch.float32),), ()

    @staticmethod
    def scales(steps: Tensor) -> Tensor:
        return steps

    @staticmethod
    def decode(codes: Tensor, scales: Tensor) -> Tensor:
        return codes.float().mul_(scales[:, None])


KINDS: dict[str, type[QuantizedLinear]] = {"nf4": NF4Linear, "int8": Int8Linear}


def hide_from_compiler(module: nn.Module) -> None:
    """Exclude quantised layers from torch.compile, which keeps decoded matrices between passes."""
    for layer in module.modules():
        if isinstance(layer, QuantizedLinear):
            hidden = torch.compiler.disable(layer.forward)
            layer.forward = hidden  # pyright: ignore[reportAttributeAccessIssue]


def quantize_(module: nn.Module, kind: str, device: torch.device | None = None) -> None:
    """Replace every nn.Linear inside `module` by a quantised layer, on `device` where one is given.

    `kind` is a name of KINDS. Each matrix is released before the next one is read.
    """
    for parent in list(module.modules()):
        for name in [name for name, child in parent.named_children() if type(child) is nn.Linear]:
            setattr(parent, name, KINDS[kind](getattr(parent, name).to(device)))


def nf4_levels() -> Tensor:
    """The 16 levels of 4-bit NormalFloat in fp32, ascending.

    They are quantiles of a normal distribution, scaled to [−1, 1]. Eight are above 0 and seven
    below, each half evenly spaced in probability, with an exact 0 between (Dettmers et al. 2023,
    section 3 and appendix E).
    """
    # A normal distribution has no largest value. The outermost quantile is the mean of two: the
    # middle of the last of 15 even shares of probability, and of the last of 16.
    outermost = 1 - (1 / (2 * 15) + 1 / (2 * 16)) / 2
    quantile, half = statistics.NormalDist().inv_cdf, outermost - 0.5
    below, above = (
        [quantile(0.5 + half * step / count) for step in range(1, count + 1)] for count in (7, 8)
    )
    levels = [*(-level for level in reversed(below)), 0.0, *above]
    return torch.tensor([level / above[-1] for level in levels], device="cpu")


@functools.cache
def _nf4_pairs(device: torch.device) -> Tensor:
    """The two weights that each byte of codes stands for, (256, 2) in fp32."""
    with torch.inference_mode(False):  # it is kept, also for training
        levels = nf4_levels()
        return torch.stack((levels.repeat_interleave(16), levels.repeat(16)), dim=1).to(device)


def _in_blocks(tensor: Tensor, size: int) -> Tensor:
    """All of `tensor` in rows of `size`, the last one padded with zeros."""
    flat = tensor.reshape(-1)
    return F.pad(flat, (0, -len(flat) % size)).view(-1, size)


def _divisor(scales: Tensor) -> Tensor:
    """(R,) → (R, 1), with 1 in place of 0: a block of zeros stays one."""
    return scales.masked_fill(scales == 0, 1)[:, None]
