"""Bytes that the layers of a forward pass keep for the backward pass, computed from shapes.

Of a block, also what its backward pass needs besides. The rules follow the code (`attention.py`,
`language_model.py`, `vision_encoder.py`). A trainable matrix keeps its input and, if it is held in
fp32, a copy of itself in the compute dtype; a frozen one keeps neither. A norm keeps its input and
one or two numbers per vector. A GELU keeps its input, a gated product both factors, and dropout its
mask.
"""

from dataclasses import dataclass

import torch
from torch import nn

from nanovlm.model.attention import WRITTEN_OUT_LIMIT
from nanovlm.model.language_model import DecoderBlock, LanguageModelConfig
from nanovlm.model.layers import LayerNorm, Reducer, RMSNorm
from nanovlm.model.lora import LoRALinear
from nanovlm.model.moe import MixtureOfExperts
from nanovlm.model.projector import ResamplerProjector
from nanovlm.model.quantization import AT_ONCE, QuantizedLinear
from nanovlm.model.resampler import Resampler
from nanovlm.model.vision_encoder import VisionBlock, VisionEncoderConfig
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.freezing import is_trainable
from nanovlm.training.monitor.walk import Layer, input_matrices

FP32, INT64 = 4, 8  # bytes


@dataclass(frozen=True)
class Computing:
    """The dtype of matrix products and the type of device that computes them."""

    dtype: torch.dtype
    device: str

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    def writes_out(self, queries: int, keys: int) -> bool:
        """Whether `attend` computes attention step by step.

        That keeps every score; a fused kernel keeps one number per query.
        """
        on_cpu = self.device == "cpu" and self.dtype != torch.float32
        return on_cpu and queries * keys <= WRITTEN_OUT_LIMIT

    def dropout(self, numbers: float, rate: float) -> float:
        """What dropout keeps: a factor per number, or on CUDA a byte that says whether it is 0."""
        return numbers * (1 if self.device == "cuda" else self.size) * (rate > 0)


@dataclass(frozen=True)
class BlockMemory:
    """Bytes of one block; all but `working` are kept until its backward pass."""

    input: float = 0
    activations: float = 0  # the input included
    casts: float = 0  # of its weights
    working: float = 0  # what the backward pass needs besides


def block_memory(layer: Layer, model: VisionLanguageModel, computing: Computing) -> BlockMemory:
    """Of a block of either part that the backward pass reaches."""
    if isinstance(layer.module, DecoderBlock):
        return _decoder_block(layer.module, layer, model.config.language_model, computing)
    assert isinstance(layer.module, VisionBlock)
    # The position table makes the residual stream fp32 where it is trainable, and so held in fp32.
    table = model.vision_encoder.position_embedding
    stream_size = FP32 if table.dtype == torch.float32 else computing.size
    return _vision_block(layer, model.config.vision_encoder, computing, stream_size)


def _decoder_block(
    block: DecoderBlock, layer: Layer, config: LanguageModelConfig, computing: Computing
) -> BlockMemory:
    attention, size, vectors, outputs = (
        block.attention,
        computing.size,
        layer.vectors,
        layer.outputs,
    )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    stats = FP32 * (2 if config.norm == "layer" else 1)
    projected = vectors * (heads + 2 * kv_heads) * config.head_dim * size  # queries, keys, values
    stream = vectors * config.hidden_size * size
    scores = heads * layer.rows * layer.length**2 * size

    kept = stream + vectors * stats  # the first norm
    inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
    kept += projected + stream * any(map(is_trainable, inputs))
    if config.qk_norm:
        kept += vectors * (heads + kv_heads) * (config.head_dim * size + FP32)
    attended = vectors * heads * config.head_dim * size
    written_out = computing.writes_out(layer.length, layer.length)
    if written_out:
        kept += scores + attended * is_trainable(attention.out_proj)
    else:  # the kernel keeps its output and a number per query
        kept += attended + vectors * heads * FP32
    kept += outputs * (config.hidden_size * size + stats)  # the second norm
    kept += _mlp(block.mlp, config, outputs, size)
    kept += computing.dropout((vectors + outputs) * config.hidden_size, config.dropout)
    for path, part in block.named_modules():
        if isinstance(part, LoRALinear):
            kept += _adapter(part, outputs if path.startswith("mlp") else vectors, size)

    gate = outputs * config.intermediate_size * size
    working = max(3 * gate, 2 * scores if written_out else 2 * projected)
    working += 2 * stream + largest_matrix(block, size)
    return BlockMemory(stream, kept, cast_bytes(block, computing), working)


def _mlp(mlp: nn.Module, config: LanguageModelConfig, vectors: float, size: int) -> float:
    """What the MLP of a decoder block keeps."""
    if isinstance(mlp, MixtureOfExperts):
        return _experts(mlp, config, vectors, size)
    trainable = any(map(is_trainable, input_matrices(mlp)))
    return vectors * config.hidden_size * size * trainable + _inner(mlp, config, vectors, size)


def _inner(mlp: nn.Module, config: LanguageModelConfig, vectors: float, size: int) -> float:
    """What an MLP keeps besides its input: its first matrices' output and its last one's input."""
    inner = vectors * config.intermediate_size * size
    return inner * (len(input_matrices(mlp)) + is_trainable(mlp.get_submodule("down_proj")))


def _experts(
    experts: MixtureOfExperts, config: LanguageModelConfig, vectors: float, size: int
) -> float:
    """How often each expert is chosen makes no difference: the inputs of all are one matrix."""
    trainable, chosen = is_trainable(experts), vectors * experts.per_token
    width = config.hidden_size * size
    # The inputs, once as they come and once sorted by expert; the outputs, which are weighted. Per
    # choice three indices; per token the router's probabilities and their share of the loss.
    kept = (vectors + chosen) * width * trainable + chosen * width + 3 * chosen * INT64
    kept += vectors * len(experts.experts) * FP32 * (1 + trainable)
    kept += _inner(experts.experts[0], config, chosen, size)
    return kept + sum(_inner(expert, config, vectors, size) for expert in experts.shared_experts)


def _adapter(layer: LoRALinear, vectors: int, size: int) -> float:
    """What an adapter keeps besides its input: the vectors of its rank, and dropout's tensors."""
    rank, width = layer.lora_A.shape
    return vectors * (rank * size + width * (size + 1) * (layer.dropout > 0))


def _vision_block(
    layer: Layer, config: VisionEncoderConfig, computing: Computing, stream_size: int
) -> BlockMemory:
    """`stream_size` is the bytes of a number in the residual stream."""
    size, vectors, heads = computing.size, layer.vectors, config.num_attention_heads
    stream = vectors * config.hidden_size * stream_size
    inner = vectors * config.intermediate_size * size
    scores = heads * layer.rows * layer.length**2 * size
    # In the stream's dtype: the inputs of both norms. In the compute dtype: two normed inputs,
    # queries, keys, values and the input of attention's last matrix; with layer scale the outputs
    # of attention and MLP. A norm's output in fp32 is cast three times, for queries, keys, values.
    tensors = 6 + 2 * config.layer_scale + 2 * (size != stream_size)
    kept = tensors * vectors * config.hidden_size * size + 2 * (stream + 2 * vectors * FP32)
    kept += inner * inner_tensors(config)
    written_out = computing.writes_out(layer.length, layer.length)
    kept += scores if written_out else heads * vectors * FP32
    working = max(2 * scores * written_out, 2 * inner)
    working += 2 * stream + largest_matrix(layer.module, size)
    return BlockMemory(stream, kept, cast_bytes(layer.module, computing), working)


def inner_tensors(config: VisionEncoderConfig) -> int:
    """How many tensors of the MLP's width a vision block keeps.

    The activation's input, its result, and what else its formula needs.
    """
    return 4 if config.swiglu else 3 if config.hidden_act == "quick_gelu" else 2


def kept_outside_blocks(layer: Layer, model: VisionLanguageModel, computing: Computing) -> float:
    """What any other layer that the backward pass reaches keeps, casts of its weights included."""
    module, image = layer.module, model.config.image
    if module is model.projector:
        return _projector(layer, computing)
    if isinstance(module, nn.Conv2d):  # the patch embedding: the pixels
        pixels = layer.rows * 3 * image.height * image.width
        cast = pixels * computing.size if computing.size < FP32 else 0
        return cast + cast_bytes(module, computing)
    if isinstance(module, Resampler):
        return _resampler(module, layer, computing)
    if isinstance(module, Reducer):
        return _reducer(module, layer, computing)
    if isinstance(module, nn.Dropout):
        width = model.config.language_model.hidden_size
        return computing.dropout(layer.vectors * width, module.p)
    if isinstance(module, RMSNorm | LayerNorm):  # the language model's
        return layer.vectors * (module.weight.numel() * computing.size + FP32)
    if isinstance(module, nn.LayerNorm):  # the vision encoder's
        return layer.vectors * module.weight.numel() * FP32
    return 0


def _reducer(reducer: Reducer, layer: Layer, computing: Computing) -> float:
    size, trainable = computing.size, is_trainable(reducer)
    wide, narrow, width = (
        reducer.down.in_features,
        reducer.down.out_features,
        reducer.up.out_features,
    )
    kept = layer.vectors * (wide * trainable + narrow * (1 + trainable) + width) * size
    return kept + 2 * layer.vectors * FP32 + cast_bytes(reducer, computing)


def _resampler(resampler: Resampler, layer: Layer, computing: Computing) -> float:
    size, (queries, width) = computing.size, resampler.queries.shape
    # Per patch: the input, the norm's input, the input of keys and of values. Per query: the
    # norm's input and its result.
    kept = layer.vectors * (resampler.kv_proj.in_features * size + width * (FP32 + 2 * size))
    kept += layer.outputs * width * (FP32 + size) + 2 * queries * width * FP32
    kept += _cross_attention(layer, width, resampler.attention.num_heads, computing)
    return kept + cast_bytes(resampler, computing)


def _cross_attention(layer: Layer, width: int, heads: int, computing: Computing) -> float:
    """Keys and values; the scores, or a number per query; the input of the last matrix."""
    size, queries = computing.size, layer.outputs // layer.rows
    written_out = computing.writes_out(queries, layer.length)
    scores = heads * (layer.length * size if written_out else FP32)
    return 2 * layer.vectors * width * size + layer.outputs * (scores + width * size)


def _projector(layer: Layer, computing: Computing) -> float:
    """The casts of the matrices that multiply patches are kept only for the patches' gradient."""
    projector, size, trainable = layer.module, computing.size, is_trainable(layer.module)
    matrices = [part for part in projector.modules() if isinstance(part, nn.Linear)]
    text_width = matrices[-1].out_features
    kept = layer.outputs * text_width * size + cast_bytes(projector, computing)  # visual tokens
    if isinstance(projector, ResamplerProjector):
        attention, width = projector.attention, projector.queries.shape[1]
        first = [attention.k_proj, attention.v_proj]
        kept += layer.vectors * width * size * trainable
        kept += _cross_attention(layer, width, attention.num_heads, computing)
        # Two norms in fp32 and their outputs; the inputs of two activations and their outputs.
        kept += layer.outputs * 2 * width * (FP32 + size * trainable)
        kept += layer.outputs * (4 * width + text_width) * size * (1 + trainable)
    else:  # the first matrix's input; the activation's input and its result
        first = matrices[:1]
        inner = text_width * (1 + trainable) * (len(matrices) > 1)
        kept += layer.outputs * size * (matrices[0].in_features * trainable + inner)
    if not layer.input_gradient:
        kept -= sum(cast_bytes(matrix, computing) for matrix in first)
    return kept


def cast_bytes(module: nn.Module, computing: Computing) -> int:
    """Copies in the compute dtype of the weights and biases held in another one."""
    others = (parameter for parameter in module.parameters() if parameter.dtype != computing.dtype)
    return computing.size * sum(parameter.numel() for parameter in others)


def largest_matrix(module: nn.Module, size: int) -> int:
    """The largest matrix once more: the gradient of its cast copy.

    Of a quantised one it is the matrix decoded, part by part in fp32.
    """
    gradients = [
        parameter.numel() * size for parameter in module.parameters() if parameter.requires_grad
    ]
    quantized = [
        layer.in_features * layer.out_features
        for layer in module.modules()
        if isinstance(layer, QuantizedLinear)
    ]
    decoded = [count * size + min(count, AT_ONCE) * 2 * FP32 for count in quantized]
    return max(gradients + decoded, default=0)
