"""Weights in 8 or 4 bits for answers; what enters and leaves a layer stays in 16 or 32 bits.

To write a token, every weight is read once, and reading is what takes the time. A CPU reads them
through PyTorch's kernels, which decode as they multiply; `dequantize` says the same in a few lines
and serves longer inputs, whose products take more time than decoding. Training has quantised
layers of its own, which pass gradients on (`quantization.py`).
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.model.language_model import LanguageModel

GROUP = 32  # weights of a row that share a scale and an offset, in 4 bits
MIDDLE = 8  # the code of the offset itself
AT_ONCE = 4096  # rows that are encoded together, in whole blocks: an output head has 150,000
KINDS = ("int8", "int4")
# Layers that get the same input, in the order in which a block calls them: one product serves them.
SAME_INPUT = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
# Rows of a block of 4-bit codes, and whether the two of a byte are neighbours. PyTorch's kernel
# takes the first order where a CPU has AVX-512, the second with AVX2, and another elsewhere.
LAYOUTS = (64, False), (32, False), (32, True), (16, True)


class WeightOnlyLinear(nn.Module):
    """x Wᵀ + b in place of an nn.Linear, for inference alone.

    (…, in_features) → (…, out_features). Codes and scales are buffers outside the state dict: such
    a model is never saved.
    """

    codes: Tensor
    kernel_rows: int  # inputs up to which the kernel takes less time than decoding the matrix first

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        """`dtype` is that of the inputs, in which scales are kept, too."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = dtype
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.to(dtype), False)
        self.encode(linear.weight.detach(), dtype)

    def encode(self, weight: Tensor, dtype: torch.dtype) -> None:
        """Keep the matrix (out_features, in_features) as codes."""
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        """The matrix (out_features, in_features)."""
        raise NotImplementedError

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the matrix: (…) → (…, in_features)."""
        raise NotImplementedError

    def kernel(self, rows: Tensor) -> Tensor:
        """(R, in_features) → (R, out_features), without the bias."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.to(self.dtype)  # under autocast, norms give fp32
        rows = inputs.reshape(-1, self.in_features).contiguous()
        if inputs.device.type != "cpu" or len(rows) > self.kernel_rows:
            return F.linear(inputs, self.dequantize(), self.bias)
        outputs = self.kernel(rows).view(*inputs.shape[:-1], self.out_features)
        return outputs if self.bias is None else outputs + self.bias

    def _keep(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)


class Int8WeightOnly(WeightOnlyLinear):
    """Each weight is a whole number from −127 to 127 times the step of its row."""

    steps: Tensor  # (out_features,)

    def encode(self, weight: Tensor, dtype: torch.dtype) -> None:
        steps = (weight.abs().amax(dim=1).float() / 127).to(dtype)
        divisor = steps.float().masked_fill(steps == 0, 1)[:, None]
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        for start in range(0, len(weight), AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            codes[rows] = (weight[rows] / divisor[rows]).round_().clamp_(-127, 127)
        self._keep(codes=codes, steps=steps)
        # In bfloat16, PyTorch's kernel reads past rows that are not whole vectors, and crashes.
        self.kernel_rows = 32 if self.in_features % 16 == 0 else 0

    def dequantize(self) -> Tensor:
        return self.codes * self.steps[:, None]

    def rows(self, ids: Tensor) -> Tensor:
        return self.codes[ids] * self.steps[ids][..., None]

    def kernel(self, rows: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(rows, self.codes, self.steps)


class Int4WeightOnly(WeightOnlyLinear):
    """Each weight is (code − 8) · scale + offset, with codes from 0 to 15: 5 bits a weight.

    Scale and offset span each group of a row from its smallest to its largest weight.
    """

    scales: Tensor  # (in_features / GROUP, R, 2): scale and offset

    def encode(self, weight: Tensor, dtype: torch.dtype) -> None:
        layout = kernel_layout() if weight.device.type == "cpu" else None
        self.kernel_rows, self.layout = 96 if layout else 0, layout or LAYOUTS[0]
        parts = [self._encode_rows(rows, dtype) for rows in weight.split(AT_ONCE)]
        codes, scales = zip(*parts)
        self._keep(codes=torch.cat(codes), scales=torch.cat(scales, dim=1))

    def _encode_rows(self, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(R, in_features) → packed codes and (in_features / GROUP, R, 2)."""
        weight = F.pad(weight, (0, 0, 0, -len(weight) % self.layout[0]))  # whole blocks
        groups = weight.float().unflatten(1, (-1, GROUP))  # (R, G, GROUP)
        low, high = groups.aminmax(dim=2)
        scale = ((high - low) / 15).to(dtype)
        offset = (low + MIDDLE * scale.float()).to(dtype)
        divisor = scale.float().masked_fill(scale == 0, 1)  # a group of equal weights
        codes = (groups - offset.float()[..., None]).div_(divisor[..., None]).add_(MIDDLE)
        codes = codes.round_().clamp_(0, 15).to(torch.uint8).flatten(1)
        return pack(codes, *self.layout), torch.stack((scale, offset), dim=2).transpose(0, 1)

    def dequantize(self) -> Tensor:
        codes = unpack(self.codes, *self.layout).T  # (in_features, R)
        centred = codes.to(self.scales.dtype).sub_(MIDDLE).unflatten(0, (-1, GROUP))
        scale, offset = self.scales.transpose(1, 2).contiguous()[:, :, None].unbind(dim=1)
        return torch.addcmul(offset, centred, scale).flatten(0, 1).T[: self.out_features]

    def rows(self, ids: Tensor) -> Tensor:
        block, neighbours = self.layout
        place = ids % block
        half, byte = place // (block // 2), place % (block // 2)
        if neighbours:
            half, byte = place % 2, place // 2
        codes = self.codes[ids // block, :, byte] >> (4 * half)[..., None] & 15  # (…, in_features)
        centred = (codes.to(self.scales.dtype) - MIDDLE).unflatten(-1, (-1, GROUP))
        scale, offset = self.scales[:, ids].movedim(0, -2)[..., None, :].unbind(dim=-1)
        return torch.addcmul(offset, centred, scale).flatten(-2)

    def kernel(self, rows: Tensor) -> Tensor:
        codes = self.codes.view(-1, self.in_features // 2)  # the shape that the kernel asks for
        outputs = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, codes, GROUP, self.scales)
        return outputs[:, : self.out_features]


class JoinedLinear(nn.Module):
    """Several layers of one input as one, whose output is kept until the last of them is called."""

    def __init__(self, layer: WeightOnlyLinear, sizes: list[int]) -> None:
        """`sizes` are the rows of each in `layer`."""
        super().__init__()
        self.layer, self.sizes = layer, sizes
        self.inputs: Tensor | None = None
        self.outputs: tuple[Tensor, ...] = ()

    def output(self, inputs: Tensor, index: int) -> Tensor:
        """That of the layer `index`; the first is called first, and all with the same tensor."""
        if index == 0:
            self.inputs, self.outputs = inputs, self.layer(inputs).split(self.sizes, dim=-1)
        assert self.inputs is inputs, "the layers of a JoinedLinear have one input"
        output = self.outputs[index]
        if index == len(self.sizes) - 1:
            self.inputs, self.outputs = None, ()
        return output


class LinearPart(nn.Module):
    """One of the layers of a JoinedLinear."""

    def __init__(self, joined: JoinedLinear, index: int) -> None:
        super().__init__()
        self.joined, self.index = joined, index

    def dequantize(self) -> Tensor:
        """The matrix (out_features, in_features)."""
        return self.joined.layer.dequantize().split(self.joined.sizes)[self.index]

    def forward(self, inputs: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features)."""
        return self.joined.output(inputs, self.index)


class WeightOnlyEmbedding(nn.Module):
    """An embedding table in few bits, which may be the output head, too."""

    def __init__(self, table: WeightOnlyLinear) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids: Tensor) -> Tensor:
        """(…) → (…, C)."""
        return self.table.rows(ids)


def quantize_for_answers(model: LanguageModel, kind: str, dtype: torch.dtype) -> None:
    """Quantise the matrices of a language model on their device, for inputs of `dtype`.

    kind: "int8", or "int4", which leaves matrices whose rows are not whole groups in 8 bits.

    Each matrix is released before the next one is read, so that a mapped file is never copied.
    """

    def quantized(linear: nn.Linear) -> WeightOnlyLinear:
        fits = linear.in_features % GROUP == 0
        return (Int4WeightOnly if kind == "int4" and fits else Int8WeightOnly)(linear, dtype)

    for parent in list(model.blocks.modules()):
        for names in SAME_INPUT:
            children = [getattr(parent, name, None) for name in names]
            linears = [child for child in children if type(child) is nn.Linear]
            if len(linears) == len(names):
                sizes = [linear.out_features for linear in linears]
                joined = JoinedLinear(quantized(_join(linears)), sizes)
                for index, name in enumerate(names):
                    setattr(parent, name, LinearPart(joined, index))
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, quantized(child))
    tied = model.config.tie_word_embeddings
    table = quantized(_linear(model.embed_tokens.weight))
    model.quantized_head = table if tied else quantized(model.lm_head)
    model.embed_tokens = WeightOnlyEmbedding(table)  # pyright: ignore[reportAttributeAccessIssue]
    if not tied:
        del model.lm_head


def _join(linears: list[nn.Linear]) -> nn.Linear:
    """One layer with the rows of all."""
    joined = _linear(torch.cat([linear.weight.detach() for linear in linears]))
    biases = [linear.bias for linear in linears if linear.bias is not None]
    if biases:
        joined.bias = nn.Parameter(torch.cat([bias.detach() for bias in biases]), False)
    return joined


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def pack(codes: Tensor, block: int, neighbours: bool) -> Tensor:
    """(R, C) codes, R in whole blocks → (R / block, C, block / 2), two codes in a byte.

    The first of two is in the low half. They are of neighbouring rows, or of rows that are half a
    block apart.
    """
    blocks = codes.unflatten(0, (-1, block))  # (blocks, block, C)
    if neighbours:
        first, second = blocks[:, 0::2], blocks[:, 1::2]
    else:
        first, second = blocks.chunk(2, dim=1)
    return (first | second << 4).transpose(1, 2).contiguous()


def unpack(packed: Tensor, block: int, neighbours: bool) -> Tensor:
    """The inverse of `pack`: (R / block, C, block / 2) → (R, C)."""
    halves = packed & 15, packed >> 4
    codes = torch.stack(halves, dim=3).flatten(2) if neighbours else torch.cat(halves, dim=2)
    return codes.transpose(0, 1).flatten(1).T  # column by column in memory


@functools.cache
def kernel_layout() -> tuple[int, bool] | None:
    """The layout that PyTorch's kernel for CPUs reads on this machine; None if it is none of ours.

    PyTorch does not say, but packs codes itself: a pattern shows the order that it takes.
    """
    pattern = torch.arange(64 * 32).remainder(251).remainder(16).view(64, 32).to(torch.uint8)
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(pattern.int(), 1).flatten()
    except (RuntimeError, AttributeError):  # a build without it
        return None
    for layout in LAYOUTS:
        if torch.equal(pack(pattern, *layout).flatten(), packed):
            return layout
    return None
