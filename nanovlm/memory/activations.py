"""What a forward pass keeps for the backward pass, and what the backward pass of a block needs besides: bytes from shapes.

The rules are the code's (`attention.py`, `decoder.py`, `vit.py`). A matrix that learns keeps its input and, where it is
held in fp32, a copy of itself in the computing dtype; a frozen one keeps neither. A norm keeps its input and one or two
numbers a vector. A GELU keeps its input, the gated product its two. Dropout keeps what it multiplied with.
"""

from dataclasses import dataclass

import torch
from torch import nn

from nanovlm.model.attention import WRITTEN_OUT_LIMIT
from nanovlm.model.language_model import DecoderBlock, LanguageModel, LanguageModelConfig, Reducer
from nanovlm.model.lora import LoRALinear
from nanovlm.model.moe import MixtureOfExperts
from nanovlm.model.projector import ResamplerProjector
from nanovlm.model.quantization import AT_ONCE, QuantizedLinear
from nanovlm.model.resampler import Resampler
from nanovlm.model.vision_encoder import VisionBlock, VisionEncoderConfig
from nanovlm.training.freezing import is_trainable

FP32, INT64 = 4, 8  # bytes


@dataclass(frozen=True)
class Computing:
    """In which dtype, and on which type of device, products are computed."""

    dtype: torch.dtype
    device: str

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    def writes_out(self, queries: int, keys: int) -> bool:
        """Whether attention is written out (`attend`), which keeps every score; a fused kernel keeps one number a query."""
        return (
            self.device == "cpu"
            and self.dtype != torch.float32
            and queries * keys <= WRITTEN_OUT_LIMIT
        )

    def dropout(self, numbers: float, rate: float) -> float:
        """What dropout keeps: a factor a number, of which CUDA's kernel says in a byte whether it is 0."""
        return numbers * (1 if self.device == "cuda" else self.size) * (rate > 0)


@dataclass(frozen=True)
class Kept:
    """Bytes of one block: its `input`, `activations` (the input among them) and `casts` of weights stay until its backward
    pass, which takes `working` more."""

    input: float
    activations: float
    casts: float
    working: float


def decoder_block(
    block: DecoderBlock,
    config: LanguageModelConfig,
    rows: int,
    length: int,
    positions: int,
    computing: Computing,
) -> Kept:
    """A block that a gradient flows through. Of the tokens, `positions` pass its MLP: in the last block, those that
    predict a label."""
    attention, mlp, size, tokens = block.attention, block.mlp, computing.size, rows * length
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    projected = tokens * (heads + 2 * kv_heads) * config.head_dim * size  # queries, keys and values
    stream, scores = tokens * config.hidden_size * size, rows * heads * length * length * size
    stats = FP32 * (2 if config.norm == "layer" else 1)

    kept = stream + tokens * stats  # the first norm
    kept += projected + stream * _any_learns(attention.q_proj, attention.k_proj, attention.v_proj)
    if config.qk_norm:
        kept += tokens * (heads + kv_heads) * (config.head_dim * size + FP32)
    attended = tokens * heads * config.head_dim * size
    written_out = computing.writes_out(length, length)
    if written_out:
        kept += scores + attended * _any_learns(attention.out_proj)
    else:  # the kernel keeps its output, one number a query, and the mask in the dtype of the scores
        kept += attended + tokens * heads * FP32 + rows * length * length * size
    gate = positions * config.intermediate_size * size
    kept += positions * (config.hidden_size * size + stats)  # the second norm
    kept += _mlp(mlp, config, positions, size) + computing.dropout(
        (tokens + positions) * config.hidden_size, config.dropout
    )
    kept += sum(
        _adapter_bytes(layer, positions if path.startswith("mlp") else tokens, size)
        for path, layer in block.named_modules()
        if isinstance(layer, LoRALinear)
    )

    in_attention = 2 * scores if written_out else 2 * projected
    working = max(3 * gate, in_attention) + 2 * stream + _matrix_bytes(block, size)
    return Kept(stream, kept, cast_bytes(block, computing), working)


def _mlp(mlp: nn.Module, config: LanguageModelConfig, tokens: float, size: int) -> float:
    """What an MLP keeps of `tokens` that pass it."""
    if isinstance(mlp, MixtureOfExperts):
        return _experts(mlp, config, tokens, size)
    into = [mlp.gate_proj, mlp.up_proj] if hasattr(mlp, "gate_proj") else [mlp.up_proj]
    return tokens * config.hidden_size * size * _any_learns(*into) + _inside(
        mlp, config, tokens, size
    )


def _inside(mlp: nn.Module, config: LanguageModelConfig, tokens: float, size: int) -> float:
    """The same without the MLP's input: what its first matrices give, and what its last one reads."""
    inner = tokens * config.intermediate_size * size
    return inner * (2 if hasattr(mlp, "gate_proj") else 1) + inner * _any_learns(mlp.down_proj)


def _experts(
    experts: MixtureOfExperts, config: LanguageModelConfig, tokens: float, size: int
) -> float:
    """How busy each expert is does not matter, as long as there is one matrix of inputs for all that are chosen."""
    learned, chosen, vector = (
        is_trainable(experts),
        tokens * experts.per_token,
        config.hidden_size * size,
    )
    # All tokens, and once more in the order of the experts; what these give, kept to weigh it. Of each choice three
    # numbers of its place; of each token the router's probabilities and their part in the loss.
    kept = (tokens + chosen) * vector * learned + chosen * vector + 3 * chosen * INT64
    kept += tokens * len(experts.experts) * FP32 * (1 + learned)
    kept += _inside(experts.experts[0], config, chosen, size)
    return kept + sum(_inside(expert, config, tokens, size) for expert in experts.shared_experts)


def reducing(reducer: Reducer, tokens: int, computing: Computing) -> float:
    """What the reducer of wide embeddings keeps, and its cast weights."""
    size, learned = computing.size, is_trainable(reducer)
    wide, narrow, width = (
        reducer.down.in_features,
        reducer.down.out_features,
        reducer.up.out_features,
    )
    kept = tokens * (wide * learned + narrow * (1 + learned) + width) * size + 2 * tokens * FP32
    return kept + cast_bytes(reducer, computing)


def vision_block(
    block: VisionBlock,
    config: VisionEncoderConfig,
    images: int,
    tokens: int,
    computing: Computing,
    stream_size: int,
) -> Kept:
    """A block of the eyes that is_trainable, for `tokens` an image. Its residual stream has numbers of `stream_size` bytes: the
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
    written_out = computing.writes_out(tokens, tokens)
    kept += scores if written_out else count * config.num_attention_heads * FP32
    working = max(2 * scores * written_out, 2 * count * config.intermediate_size * size)
    working += 2 * vector * stream_size + _matrix_bytes(block, size)
    return Kept(vector * stream_size, kept, cast_bytes(block, computing), working)


def resampling(resampler: Resampler, images: int, patches: int, computing: Computing) -> float:
    """What a resampler that learns keeps for `patches` an image, and its cast weights."""
    size, (queries, width) = computing.size, resampler.queries.shape
    seen, given = images * patches, images * queries
    # Of each patch: what comes in, the norm's input, what keys and values are made of. Of each query: the norm's input
    # and its result.
    kept = seen * (resampler.kv_proj.in_features * size + width * (FP32 + 2 * size))
    kept += given * width * (FP32 + size) + 2 * queries * width * FP32
    return (
        kept
        + _cross_attention(
            resampler.attention.num_heads, width, images, queries, patches, computing
        )
        + cast_bytes(resampler, computing)
    )


def _cross_attention(
    heads: int, width: int, images: int, queries: int, patches: int, computing: Computing
) -> float:
    """Keys and values, the scores or one number a query, and what attention gives before its last matrix."""
    scores = patches * computing.size if computing.writes_out(queries, patches) else FP32
    return images * (
        2 * patches * width * computing.size + queries * (heads * scores + width * computing.size)
    )


def projecting(
    projector: nn.Module,
    images: int,
    patches: int,
    tokens: int,
    eyes_learn: bool,
    computing: Computing,
) -> float:
    """What a projector that a gradient flows through keeps, and its cast weights: of `patches` an image it makes `tokens`.
    The weights that read patches are not needed again unless the eyes learn."""
    size, learned, given = computing.size, is_trainable(projector), images * tokens
    layers = [layer for layer in projector.modules() if isinstance(layer, nn.Linear)]
    wide = layers[-1].out_features
    readers = (
        [projector.attention.k_proj, projector.attention.v_proj]
        if hasattr(projector, "attention")
        else layers[:1]
    )
    kept = given * wide * size + cast_bytes(projector, computing)  # the visual tokens
    kept -= 0 if eyes_learn else sum(cast_bytes(layer, computing) for layer in readers)
    if not isinstance(
        projector, ResamplerProjector
    ):  # the activation's input, its result, the first matrix's input
        return kept + given * size * (
            layers[0].in_features * learned + wide * (1 + learned) * (len(layers) > 1)
        )
    width = projector.queries.shape[1]
    kept += images * patches * width * size * learned
    kept += _cross_attention(
        projector.attention.num_heads, width, images, tokens, patches, computing
    )
    # Two norms in fp32 and what they give, the activations of two MLPs and what they give.
    return kept + given * (
        2 * width * (FP32 + size * learned) + (4 * width + wide) * size * (1 + learned)
    )


def looking(config: VisionEncoderConfig, images: int, tokens: int, computing: Computing) -> float:
    """What a frozen pair of eyes needs at most at a time, in one of its blocks: the stream, the normed stream, and either
    attention or the MLP; or in their resampler: its two vectors a patch, and the keys and values made of them."""
    vector = images * tokens * config.hidden_size
    scores = (
        images * config.num_attention_heads * tokens * tokens * computing.writes_out(tokens, tokens)
    )
    inner = images * tokens * config.intermediate_size * min(3, _inner_vectors(config))
    block = (2 * vector + max(4 * vector + 2 * scores, inner)) * computing.size
    return max(block, images * tokens * config.output_size * 2 * (FP32 + computing.size))


def reading(decoder: LanguageModel, tokens: int, computing: Computing) -> float:
    """What a decoder from which nothing learns needs at most at a time to read a row of `tokens` and tell the next one: the
    embeddings, the stream and the normed stream, and either attention or the MLP of one block, one matrix decoded if
    quantised; or the logits."""
    config, size = decoder.config, computing.size
    projected = (
        tokens
        * (config.num_attention_heads + 2 * config.num_key_value_heads)
        * config.head_dim
        * size
    )
    scores = (
        config.num_attention_heads * tokens * tokens * size * computing.writes_out(tokens, tokens)
    )
    passing = (
        config.experts_per_token + 1 if config.num_experts else 1
    )  # a token's experts, or all it gives to a shared one
    inner = tokens * passing * (2 * config.intermediate_size + config.hidden_size) * size
    block = max(2 * projected + 2 * scores, inner) + _matrix_bytes(decoder, size)
    stream = (
        tokens * (config.input_size * (config.embedding_size > 0) + 3 * config.hidden_size) * size
    )
    return stream + tokens * tokens * (1 + size) + max(block, config.vocab_size * (size + FP32))


def _inner_vectors(config: VisionEncoderConfig) -> int:
    """How many vectors of the MLP's width it keeps: the activation's input, its result, and what else its formula needs."""
    return 4 if config.swiglu else 3 if config.hidden_act == "quick_gelu" else 2


def _any_learns(*layers: nn.Module) -> bool:
    """Whether weights of one of these layers get a gradient, for which their input is kept."""
    return any(
        isinstance(layer, LoRALinear)
        or (isinstance(layer, nn.Linear) and layer.weight.requires_grad)
        for layer in layers
    )


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
    learning = [
        parameter.numel() * size for parameter in module.parameters() if parameter.requires_grad
    ]
    quantized = [
        layer.in_features * layer.out_features
        for layer in module.modules()
        if isinstance(layer, QuantizedLinear)
    ]
    decoded = [
        count * size + min(count, AT_ONCE) * 2 * FP32 for count in quantized
    ]  # a part of it at a time in fp32
    return max(learning + decoded, default=0)
