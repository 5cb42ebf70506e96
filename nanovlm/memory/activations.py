"""What a forward pass keeps for the backward pass, and what the backward pass of a block needs besides: bytes from shapes.

The rules are the code's (`attention.py`, `decoder.py`, `vit.py`). A matrix that learns keeps its input and, where it is
held in fp32, a copy of itself in the computing dtype; a frozen one keeps neither. A norm keeps its input and one or two
numbers a vector. The gated product keeps its two inputs.
"""

from dataclasses import dataclass

import torch
from torch import nn

from nanovlm.decoder import DecoderBlock, DecoderConfig
from nanovlm.experts import Experts
from nanovlm.resampler import Resampler
from nanovlm.training.lora import LoRALinear
from nanovlm.training.quantization import AT_ONCE, QuantizedLinear
from nanovlm.vit import VisionBlock, VisionConfig

FP32 = 4  # bytes


@dataclass(frozen=True)
class Computing:
    """How products are computed. Attention written out (`attend`) keeps every score, a fused kernel one number a query."""

    dtype: torch.dtype
    written_out: bool

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize


@dataclass(frozen=True)
class Kept:
    """Bytes of one block: its `input`, `activations` (the input among them) and `casts` of weights stay until its backward
    pass, which takes `working` more."""

    input: float
    activations: float
    casts: float
    working: float


def decoder_block(block: DecoderBlock, config: DecoderConfig, rows: int, length: int, positions: int,
                  computing: Computing) -> Kept:
    """A block that a gradient flows through. Of the tokens, `positions` pass its MLP: in the last block, those that
    predict a label."""
    attention, mlp, size, tokens = block.attention, block.mlp, computing.size, rows * length
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    projected = tokens * (heads + 2 * kv_heads) * config.head_dim * size  # queries, keys and values
    stream, scores = tokens * config.hidden_size * size, rows * heads * length * length * size

    kept = stream + tokens * FP32  # the first norm
    kept += projected + stream * _any_learns(attention.q_proj, attention.k_proj, attention.v_proj)
    if config.qk_norm:
        kept += tokens * (heads + kv_heads) * (config.head_dim * size + FP32)
    attended = tokens * heads * config.head_dim * size
    if computing.written_out:
        kept += scores + attended * _any_learns(attention.out_proj)
    else:  # the kernel keeps its output, one number a query, and the mask in the dtype of the scores
        kept += attended + tokens * heads * FP32 + rows * length * length * size
    gate = positions * config.intermediate_size * size
    kept += positions * (config.hidden_size * size + FP32)  # the second norm
    kept += _mlp(mlp, config, positions, size)
    kept += sum(_adapter_bytes(layer, positions if path.startswith("mlp") else tokens, size)
                for path, layer in block.named_modules() if isinstance(layer, LoRALinear))

    in_attention = 2 * scores if computing.written_out else 2 * projected
    working = max(3 * gate, in_attention) + 2 * stream + _matrix_bytes(block, size)
    return Kept(stream, kept, cast_bytes(block, computing), working)


def _mlp(mlp: nn.Module, config: DecoderConfig, tokens: float, size: int) -> float:
    """What an MLP keeps of `tokens` that pass it; of experts, as if they were equally busy."""
    vector = tokens * config.hidden_size * size
    if isinstance(mlp, Experts):
        choices = tokens * mlp.per_token
        each = [(expert, choices / len(mlp.experts)) for expert in mlp.experts]
        each += [(expert, tokens) for expert in mlp.shared_experts]
        chosen = choices * config.hidden_size * size  # what the chosen give, kept to weigh it
        return vector + chosen + sum(_mlp(expert, config, passing, size) for expert, passing in each)
    into = [mlp.gate_proj, mlp.up_proj] if hasattr(mlp, "gate_proj") else [mlp.up_proj]
    inner = tokens * config.intermediate_size * size
    return vector * _any_learns(*into) + len(into) * inner + inner * _any_learns(mlp.down_proj)


def vision_block(block: VisionBlock, config: VisionConfig, images: int, tokens: int, computing: Computing,
                 stream_size: int) -> Kept:
    """A block of the eyes that learns, for `tokens` an image. Its residual stream has numbers of `stream_size` bytes: the
    position table, which learns in fp32, makes it fp32."""
    count, size = images * tokens, computing.size
    vector = count * config.hidden_size
    scores = images * config.num_attention_heads * tokens * tokens * size
    # In the stream's dtype: the inputs of two norms. In the computing one: two normed inputs, queries, keys, values, what
    # attention gives before its last matrix and, where they are scaled, what it gives after it and what the MLP gives. A
    # norm's output in fp32 is cast three times, for queries, keys and values.
    kept = (6 + 2 * config.layer_scale + 2 * (size != stream_size)) * vector * size
    kept += 2 * (vector * stream_size + 2 * count * FP32)
    kept += count * config.intermediate_size * size * _inner_vectors(config)
    kept += scores if computing.written_out else count * config.num_attention_heads * FP32
    working = max(2 * scores * computing.written_out, 2 * count * config.intermediate_size * size)
    working += 2 * vector * stream_size + _matrix_bytes(block, size)
    return Kept(vector * stream_size, kept, cast_bytes(block, computing), working)


def resampling(resampler: Resampler, images: int, patches: int, computing: Computing) -> float:
    """What a resampler that learns keeps for `patches` an image, and its cast weights."""
    size, (queries, width) = computing.size, resampler.queries.shape
    seen, given = images * patches, images * queries
    # Of each patch: what comes in, the norm's input, what keys and values are made of, and both. Of each query: what
    # attention gives, the norm's input and its result.
    kept = seen * (resampler.kv_proj.in_features * size + width * (FP32 + 4 * size))
    kept += given * width * (FP32 + 2 * size) + 2 * queries * width * FP32
    heads = resampler.attention.num_heads
    kept += given * (heads * patches + width) * size if computing.written_out else given * heads * FP32
    return kept + cast_bytes(resampler, computing)


def looking(config: VisionConfig, images: int, tokens: int, computing: Computing) -> float:
    """What a frozen pair of eyes needs at most at a time, in one of its blocks: the stream, the normed stream, and either
    attention or the MLP; or in their resampler: its two vectors a patch, and the keys and values made of them."""
    vector = images * tokens * config.hidden_size
    scores = images * config.num_attention_heads * tokens * tokens * computing.written_out
    inner = images * tokens * config.intermediate_size * min(3, _inner_vectors(config))
    block = (2 * vector + max(4 * vector + 2 * scores, inner)) * computing.size
    return max(block, images * tokens * config.output_size * 2 * (FP32 + computing.size))


def _inner_vectors(config: VisionConfig) -> int:
    """How many vectors of the MLP's width it keeps: the activation's input, its result, and what else its formula needs."""
    return 4 if config.swiglu else 3 if config.hidden_act == "quick_gelu" else 2


def _any_learns(*layers: nn.Module) -> bool:
    """Whether weights of one of these layers get a gradient, for which their input is kept."""
    return any(isinstance(layer, LoRALinear) or (isinstance(layer, nn.Linear) and layer.weight.requires_grad)
               for layer in layers)


def _adapter_bytes(layer: LoRALinear, tokens: int, size: int) -> float:
    """What an adapter keeps besides its input: the narrow vector, and of dropout its result and mask."""
    dropped = tokens * layer.lora_A.shape[1] * (size + 1) if layer.dropout else 0
    return tokens * layer.lora_A.shape[0] * size + dropped


def cast_bytes(module: nn.Module, computing: Computing) -> int:
    """Copies, in the computing dtype, of the weights and biases that are held in another one."""
    others = (parameter for parameter in module.parameters() if parameter.dtype != computing.dtype)
    return computing.size * sum(parameter.numel() for parameter in others)


def _matrix_bytes(module: nn.Module, size: int) -> int:
    """The largest matrix once more: the gradient of its cast copy, or itself decoded."""
    learning = [parameter.numel() * size for parameter in module.parameters() if parameter.requires_grad]
    quantized = [layer.in_features * layer.out_features for layer in module.modules() if isinstance(layer, QuantizedLinear)]
    decoded = [count * size + min(count, AT_ONCE) * 2 * FP32 for count in quantized]  # a part of it at a time in fp32
    return max(learning + decoded, default=0)
