"""The language model: token ids → logits.

One decoder for Qwen from its first generation to Qwen3 (dense), LLaMA, SmolLM2 and Mistral, and for
models made from scratch. The path of a plain decoder is `hidden_states`: embeddings → blocks →
final norm.

Lessons: lessons/source/06_language_model.py, lessons/source/07_rotary_positions.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.errors import NanoVLMError
from nanovlm.model.attention import (
    Attention,
    AttentionConfig,
    AttentionInputs,
    KVCache,
    StaticCache,
    additive_mask,
    bidirectional_mask,
    causal_mask,
)
from nanovlm.model.layers import MLPS, NORMS, Reducer
from nanovlm.model.moe import MixtureOfExperts, count_tokens
from nanovlm.model.rotary import (
    llama3_frequencies,
    logn_scale,
    ntk_theta,
    rotary_embedding,
    rotary_frequencies,
)
from nanovlm.utils.config import MAX_EXPERTS, check_choices, check_divides, check_numbers

CHOICES = {
    "rope_type": ("default", "llama3", "dynamic_ntk"),
    "norm": NORMS,
    "positions": ("rotary", "learned"),
    "mlp": MLPS,
}


@dataclass(frozen=True)
class LanguageModelConfig:
    """The shape of a language model; names as in published configs."""

    vocab_size: int = 151936
    hidden_size: int = 896
    intermediate_size: int = 4864
    num_hidden_layers: int = 24
    num_attention_heads: int = 14
    num_key_value_heads: int = 2
    head_dim: int = 64
    qkv_bias: bool = True  # Qwen2 and 2.5
    qk_norm: bool = False  # Qwen3
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = True  # the output head is the embedding table
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    # How rotary positions go beyond the length trained at first (`rotary.py`), which is 0 where
    # they do not.
    rope_type: str = "default"
    original_max_position_embeddings: int = 0
    rope_factor: float = 1.0  # this and the next two: of llama3 alone
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    logn_attention: bool = False  # scale queries by the logarithm of their position (`logn_scale`)
    # What a language model made from scratch may have besides.
    norm: str = "rms"  # or "layer", as in GPT-2; `rms_norm_eps` is the epsilon of both
    positions: str = "rotary"  # or "learned": a table of `max_position_embeddings`, as in GPT-2
    mlp: str = "gated"  # or "gelu": linear, GELU, linear, as in GPT-2
    dropout: float = 0.0  # in training, on what enters the first block and each residual branch
    embedding_size: int = 0  # of embeddings before a reducer (0: `hidden_size`, no reducer)
    reducer_size: int = 384  # width between the reducer's two matrices
    num_experts: int = 0  # MLPs of a mixture of experts (0: one plain MLP)
    experts_per_token: int = 2
    num_shared_experts: int = 0  # MLPs that serve all tokens besides
    balance_loss: float = 0.0  # weight of the load-balance loss of each mixture (`moe.py`)

    def __post_init__(self) -> None:
        check_numbers(self)
        check_divides(self, "num_attention_heads", "num_key_value_heads")
        check_choices(self, CHOICES)
        if self.positions == "rotary" and self.head_dim % 2:
            raise self._error(f"head_dim is {self.head_dim}; rotary positions need an even one")
        if self.rope_type == "dynamic_ntk" and self.head_dim < 4:
            raise self._error(f"head_dim is {self.head_dim}; dynamic_ntk needs 4 or more")
        stretched = self.rope_type != "default" or self.logn_attention
        if stretched and self.original_max_position_embeddings < 2:
            raise self._error(
                f"rope_type {self.rope_type!r} needs original_max_position_embeddings, "
                "the length the model was first trained at"
            )
        if self.rope_high_freq_factor <= self.rope_low_freq_factor:
            raise self._error(
                f"rope_high_freq_factor = {self.rope_high_freq_factor} is not above "
                f"rope_low_freq_factor = {self.rope_low_freq_factor}"
            )
        if self.dropout >= 1:
            raise self._error(f"dropout is {self.dropout}; it has to be below 1")
        if self.embedding_size and self.tie_word_embeddings:
            raise self._error(
                f"an output head of width {self.hidden_size} cannot be an embedding table of width "
                f"{self.embedding_size}; set tie_word_embeddings to false, or embedding_size to 0"
            )
        experts = (self.num_experts + self.num_shared_experts) * self.num_hidden_layers
        if experts > MAX_EXPERTS:
            raise self._error(f"it has {experts} experts in all; the limit is {MAX_EXPERTS}")
        if self.num_experts and self.experts_per_token > self.num_experts:
            raise self._error(
                f"experts_per_token is {self.experts_per_token} and there are {self.num_experts} "
                "experts; lower it"
            )

    def _error(self, problem: str) -> NanoVLMError:
        return NanoVLMError(f"LanguageModelConfig: {problem}")

    @property
    def input_size(self) -> int:
        """The width of the embeddings that the model takes, of words and visual tokens alike."""
        return self.embedding_size or self.hidden_size

    @property
    def attention(self) -> AttentionConfig:
        """The shape of the attention of every block."""
        return AttentionConfig(
            hidden_size=self.hidden_size,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            qkv_bias=self.qkv_bias,
            output_bias=self.output_bias,
            qk_norm_eps=self.rms_norm_eps if self.qk_norm else None,
        )


class DecoderBlock(nn.Module):
    """Pre-norm causal attention, then an MLP or a mixture of experts."""

    def __init__(self, config: LanguageModelConfig, layer: int = 0) -> None:
        super().__init__()
        norm = partial(NORMS[config.norm], config.hidden_size, config.rms_norm_eps)
        sizes = config.hidden_size, config.intermediate_size, config.mlp_bias
        mlp = partial(MLPS[config.mlp], *sizes)
        self.attention_norm = norm()
        self.attention = Attention(config.attention, layer)
        self.mlp_norm = norm()
        self.mlp = _mixture(config, mlp) if config.num_experts else mlp()
        self.dropout = _dropout(config)

    def forward(
        self, hidden_states: Tensor, inputs: AttentionInputs, positions: Tensor | None = None
    ) -> Tensor:
        """(B, T, C) → (B, T, C); with flat `positions` (M,), only those pass the MLP: (M, C)."""
        attended = self.attention(self.attention_norm(hidden_states), inputs)
        hidden_states = hidden_states + self.dropout(attended)
        if positions is not None:
            hidden_states = hidden_states.flatten(0, 1).index_select(0, positions)  # (M, C)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


class LanguageModel(nn.Module):
    """A causal transformer, with the parts that its config names.

    LLaMA's (Touvron et al. 2023), Qwen's (Bai et al. 2023; Yang et al. 2024, 2025), or one made
    from scratch like GPT-2 (Radford et al. 2019).
    """

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.input_size)
        self.reducer = nn.Identity()
        if config.embedding_size:
            sizes = config.embedding_size, config.reducer_size, config.hidden_size
            self.reducer = Reducer(*sizes, config.rms_norm_eps)
        if config.positions == "learned":
            table = nn.Embedding(config.max_position_embeddings, config.hidden_size)
            self.position_embedding = table
        self.dropout = _dropout(config)
        layers = range(config.num_hidden_layers)
        self.blocks = nn.ModuleList(DecoderBlock(config, layer) for layer in layers)
        self.norm = NORMS[config.norm](config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.quantized_head: Any = None  # a module of `engine/weight_only.py`, for answers
        self.apply(_initialise)
        if config.norm == "layer":  # as in GPT-2: residual branches start smaller in deep models
            for name, parameter in self.blocks.named_parameters():
                if name.endswith(("out_proj.weight", "down_proj.weight")):
                    nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.num_hidden_layers))

    @property
    def tied_names(self) -> dict[str, str]:
        """Names under which a file may store a parameter once more, and the parameter's own.

        Qwen3-0.6B's file holds the output head beside the embedding table that it is tied to.
        """
        return {"lm_head.weight": "embed_tokens.weight"} if self.config.tie_word_embeddings else {}

    @property
    def head_weight(self) -> Tensor:
        """The output head's matrix (V, C): the embedding table itself when tied."""
        if self.quantized_head is not None:
            return self.quantized_head.dequantize()
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """(B, T) token ids → (B, T, V) logits; the other arguments as in `hidden_states`."""
        return self.logits(self.hidden_states(self.embed_tokens(input_ids), attention_mask, cache))

    def logits(self, hidden_states: Tensor) -> Tensor:
        """(…, C) → (…, V)."""
        if self.quantized_head is not None:
            return self.quantized_head(hidden_states)
        return F.linear(hidden_states, self.head_weight)

    def hidden_states(  # noqa: PLR0913 (two tensors in most passes; the others are of some only)
        self,
        embeddings: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | StaticCache | None = None,
        *,
        positions: Tensor | None = None,
        groups: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        right_padded: bool = False,
    ) -> Tensor:
        """(B, T, C_input) embeddings → (B, T, C) after the final norm, or (M, C) at `positions`.

        cache: of the tokens before these. A `StaticCache` takes one token a row and has its own
            attention mask and prompt lengths.
        attention_mask: (B, S) over all tokens, those in the cache first: 0 padding, 1 a token, more
            for branches and packed samples (`causal_mask`). None: every row is a full sequence.
        positions: (M,) flat indices into (B, T), the only ones that are needed.
        groups: (B, S) numbers of tokens that attend to each other both ways (`bidirectional_mask`).
        prompt_lengths: (B,) for dynamic NTK alone: the rows' lengths when generation began, where
            neither this pass nor the first pass of the cache tells.
        right_padded: `attention_mask` says no more than which tokens at the end of a row are
            padding. Causal attention keeps the others from these without any mask.
        """
        start = cache.length if isinstance(cache, KVCache) else 0
        if isinstance(cache, StaticCache):
            mask, position_ids = cache.mask_and_positions(embeddings.dtype)
            prompt_lengths = cache.prompt_lengths
        elif right_padded and attention_mask is not None and groups is None and start == 0:
            mask, position_ids = None, attention_mask.cumsum(dim=1) - 1
        else:
            mask, position_ids = self._mask_and_positions(embeddings, attention_mask, start, groups)
        hidden_states = self.reducer(embeddings)
        inputs = AttentionInputs(mask, mask is None and embeddings.shape[1] > 1, cache=cache)
        if self.config.positions == "learned":
            table = self._learned_positions(position_ids, start + embeddings.shape[1])
            hidden_states = hidden_states + table.to(hidden_states.dtype)
        else:
            theta = self._rotary_base(position_ids, prompt_lengths, cache)
            rotary, scale = self._rotary(position_ids, theta, hidden_states.dtype)
            inputs = inputs._replace(rotary=rotary, query_scale=scale)
        if self.config.num_experts and self.training:
            count_tokens(self, attention_mask, embeddings.shape[1], positions)

        hidden_states = self.dropout(hidden_states)
        for block in self.blocks[:-1]:
            hidden_states = block(hidden_states, inputs)
        hidden_states = self.blocks[-1](hidden_states, inputs, positions)
        if cache is not None:
            cache.advance(embeddings.shape[1])
        return self.norm(hidden_states)

    def _mask_and_positions(
        self, embeddings: Tensor, attention_mask: Tensor | None, start: int, groups: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """The additive mask, (B, 1, T, S) or None for the causal one, and positions, (B, T).

        A token's position is the number of tokens it attends to before it. That is right for
        padding on either side, branches and packed samples alike; groups do not change it.
        """
        batch, length, _ = embeddings.shape
        device = embeddings.device
        if attention_mask is None and (groups is not None or (start > 0 and length > 1)):
            attention_mask = torch.ones(batch, start + length, dtype=torch.int64, device=device)
        if attention_mask is None:
            return None, torch.arange(start, start + length, device=device).expand(batch, -1)
        mask = causal_mask(attention_mask, length)  # (B, T, S)
        position_ids = mask.sum(dim=-1) - 1  # (B, T)
        if groups is not None:
            mask = mask | bidirectional_mask(groups, length)
        return additive_mask(mask[:, None], embeddings.dtype), position_ids

    def _learned_positions(self, position_ids: Tensor, row_length: int) -> Tensor:
        """(B, T) positions → (B, T, C).

        A position may lie outside the table only where the row is longer, and only then is the
        device asked: packed rows are long, and their samples short.
        """
        limit = self.config.max_position_embeddings
        if row_length > limit and int(position_ids.max()) >= limit:
            raise NanoVLMError(
                f"a text of {int(position_ids.max()) + 1} tokens exceeds the language model's "
                f"{limit} positions; shorten it, in training with --max-length"
            )
        return self.position_embedding(position_ids)

    def _rotary_base(
        self,
        position_ids: Tensor,
        prompt_lengths: Tensor | None,
        cache: KVCache | StaticCache | None,
    ) -> float | Tensor:
        """The base of the rotary frequencies; with dynamic NTK one for each row, (B, 1, 1, 1).

        The first Qwen is trained without dynamic NTK. When it generates, its base stays that of the
        prompt however long the answer gets: the keys in the cache have been rotated with it.
        """
        config = self.config
        if config.rope_type != "dynamic_ntk":
            return config.rope_theta
        if prompt_lengths is None and isinstance(cache, KVCache) and cache.length > 0:
            prompt_lengths = cache.prompt_lengths
        if prompt_lengths is None:
            prompt_lengths = position_ids.amax(dim=1) + 1
        if isinstance(cache, KVCache):
            cache.prompt_lengths = prompt_lengths
        if self.training:
            return config.rope_theta
        trained_length = config.original_max_position_embeddings
        return ntk_theta(config.rope_theta, config.head_dim, prompt_lengths, trained_length)

    def _rotary(
        self, position_ids: Tensor, theta: float | Tensor, dtype: torch.dtype
    ) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """The rotary tables of all blocks and the scale of their queries, cast to `dtype` once."""
        config, trained_length = self.config, self.config.original_max_position_embeddings
        frequencies = rotary_frequencies(config.head_dim, theta, position_ids.device)
        if config.rope_type == "llama3":
            low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
            frequencies = llama3_frequencies(
                frequencies, config.rope_factor, low, high, trained_length
            )
        cos, sin = rotary_embedding(position_ids, frequencies)
        query_scale = None
        if config.logn_attention and not self.training:
            query_scale = logn_scale(position_ids, trained_length).to(dtype)
        return (cos.to(dtype), sin.to(dtype)), query_scale

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """An empty cache of `max_length` tokens a row, with the dtype and device of the weights."""
        config, weight = self.config, next(self.norm.parameters())
        heads, width = config.num_key_value_heads, config.head_dim
        shape = config.num_hidden_layers, batch, heads, max_length, width
        return KVCache(shape, weight.dtype, weight.device)


def _dropout(config: LanguageModelConfig) -> nn.Module:
    """GPT-2's dropout, but not on attention weights, which fused kernels do not give."""
    return nn.Dropout(config.dropout) if config.dropout else nn.Identity()


def _mixture(config: LanguageModelConfig, mlp: Callable[[], nn.Module]) -> MixtureOfExperts:
    counts = config.num_experts, config.experts_per_token, config.num_shared_experts
    return MixtureOfExperts(config.hidden_size, *counts, mlp)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
