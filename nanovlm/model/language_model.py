"""The language model: token ids → logits. Qwen from its first generation to Qwen3 (dense), LLaMA, SmolLM2, Mistral; and
decoders of our own, made from scratch."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.errors import NanoVLMError
from nanovlm.model.attention import Attention, KVCache, bidirectional_mask, causal_mask
from nanovlm.model.layers import MLPS, LayerNorm, RMSNorm
from nanovlm.model.moe import MixtureOfExperts
from nanovlm.model.rotary import (
    frequencies,
    llama3_frequencies,
    logn_scale,
    ntk_theta,
    rotary_embedding,
)
from nanovlm.utils.config import check_divides, check_numbers

NORMS: dict[str, type[nn.Module]] = {"rms": RMSNorm, "layer": LayerNorm}
ROPE_TYPES = ("default", "llama3", "dynamic_ntk")


@dataclass(frozen=True)
class LanguageModelConfig:
    """The shape of a decoder; the names are the hub's."""

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
    output_bias: bool = False  # of the attention's last matrix
    mlp_bias: bool = False
    # How rotary positions are stretched (`rotary.py`) beyond the length first trained at, which is 0 where they are not.
    rope_type: str = "default"
    original_max_position_embeddings: int = 0
    rope_factor: float = 1.0  # these three: of llama3 alone
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    logn_attention: bool = (
        False  # beyond that length queries grow with the logarithm of the tokens they see
    )
    # What a decoder made from scratch may have besides.
    norm: str = "rms"  # or "layer", as in GPT-2; `rms_norm_eps` is either's
    positions: str = "rotary"  # or "learned": a table of `max_position_embeddings`, as in GPT-2
    mlp: str = "gated"  # or "gelu": linear, GELU, linear, as in GPT-2
    dropout: float = 0.0  # in training alone (`new_dropout`)
    embedding_size: int = (
        0  # width of the word vectors where they pass a reducer (0: `hidden_size`, and none)
    )
    reducer_size: int = 384  # width between the reducer's two matrices
    num_experts: int = 0  # MLPs a block chooses from for each token (0: one MLP, which all pass)
    experts_per_token: int = 2
    num_shared_experts: int = 0  # MLPs that all tokens pass besides
    balance_loss: float = (
        0.0  # weight of the load-balance loss of each layer of experts (`experts.py`)
    )

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.rope_type not in ROPE_TYPES:
            raise NanoVLMError(
                f"LanguageModelConfig: rope_type {self.rope_type!r} is not known; take one of {', '.join(ROPE_TYPES)}"
            )
        if (
            self.rope_type != "default" or self.logn_attention
        ) and self.original_max_position_embeddings < 2:
            raise NanoVLMError(
                f"LanguageModelConfig: rope_type {self.rope_type!r} needs original_max_position_embeddings, "
                "the length the model was first trained at"
            )
        if self.rope_high_freq_factor <= self.rope_low_freq_factor:
            raise NanoVLMError(
                f"LanguageModelConfig: rope_high_freq_factor = {self.rope_high_freq_factor} is not above "
                f"rope_low_freq_factor = {self.rope_low_freq_factor}"
            )
        check_divides(self, "num_attention_heads", "num_key_value_heads")
        self._check_what_is_from_scratch()

    def _check_what_is_from_scratch(self) -> None:
        for name, known in (("norm", NORMS), ("positions", ("rotary", "learned")), ("mlp", MLPS)):
            if getattr(self, name) not in known:
                raise NanoVLMError(
                    f"LanguageModelConfig: {name} is {getattr(self, name)!r}; take one of {', '.join(known)}"
                )
        if self.dropout >= 1:
            raise NanoVLMError(
                f"LanguageModelConfig: dropout is {self.dropout}; it has to be below 1"
            )
        if self.embedding_size and self.tie_word_embeddings:
            raise NanoVLMError(
                f"LanguageModelConfig: a head of width {self.hidden_size} cannot be the table of "
                f"{self.embedding_size}-wide word vectors; set tie_word_embeddings to false, or embedding_size to 0"
            )
        if self.num_experts and self.experts_per_token > self.num_experts:
            raise NanoVLMError(
                f"LanguageModelConfig: experts_per_token is {self.experts_per_token} and there are {self.num_experts} "
                "experts; lower it"
            )

    @property
    def input_size(self) -> int:
        """The width of the embeddings that the decoder takes, words' and visual tokens' alike."""
        return self.embedding_size or self.hidden_size


class Reducer(nn.Module):
    """Wide embeddings → the model's width through a narrow middle, one for words and visual tokens."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.down = nn.Linear(config.embedding_size, config.reducer_size)
        self.up = nn.Linear(config.reducer_size, config.hidden_size)
        self.norm = LayerNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, embeddings: Tensor) -> Tensor:
        """(B, T, C_embedding) → (B, T, C)."""
        return self.norm(self.up(F.gelu(self.down(embeddings))))


def new_dropout(config: LanguageModelConfig) -> nn.Module:
    """Where GPT-2 has it but for the attention's weights, which no fused kernel shows: on what enters the first block and
    on what each attention and MLP adds to the stream."""
    return nn.Dropout(config.dropout) if config.dropout else nn.Identity()


class DecoderBlock(nn.Module):
    """Pre-norm causal attention, then the MLP or a choice of several (`experts.py`)."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        norm, mlp = (
            NORMS[config.norm],
            partial(
                MLPS[config.mlp], config.hidden_size, config.intermediate_size, config.mlp_bias
            ),
        )
        self.attention_norm = norm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            qkv_bias=config.qkv_bias,
            output_bias=config.output_bias,
            qk_norm_eps=config.rms_norm_eps if config.qk_norm else None,
        )
        self.mlp_norm = norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = (
            mlp()
            if not config.num_experts
            else MixtureOfExperts(
                config.hidden_size,
                config.num_experts,
                config.experts_per_token,
                config.num_shared_experts,
                mlp,
            )
        )
        self.has_experts, self.dropout = config.num_experts > 0, new_dropout(config)

    def forward(
        self,
        hidden_states: Tensor,
        positions: Tensor | None = None,
        present: Tensor | None = None,
        **attention,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """(B, T, C) → (B, T, C); or, past the attention, only the flat `positions` (M,) of (B, T) → (M, C).

        A block with experts gives their load-balance loss besides (`MixtureOfExperts`), over the tokens where `present` (B, T).
        """
        hidden_states = hidden_states + self.dropout(
            self.attention(self.attention_norm(hidden_states), **attention)
        )
        if positions is not None:
            hidden_states, present = hidden_states.flatten(0, 1).index_select(0, positions), None
        if not self.has_experts:
            return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))
        mixed, balance = self.mlp(self.mlp_norm(hidden_states), present)
        return hidden_states + self.dropout(mixed), balance


class LanguageModel(nn.Module):
    """A causal transformer (Touvron et al. 2023: LLaMA; Bai et al. 2023: Qwen; Yang et al. 2024, 2025: Qwen2, Qwen2.5,
    Qwen3), or one made from scratch of GPT-2's kind."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.input_size)
        self.reducer = Reducer(config) if config.embedding_size else nn.Identity()
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(
                config.max_position_embeddings, config.hidden_size
            )
        self.dropout = new_dropout(config)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = NORMS[config.norm](config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self._initialise)
        if config.norm == "layer":  # as in GPT-2: what many blocks add to the stream begins smaller
            for name, parameter in self.blocks.named_parameters():
                if name.endswith(("out_proj.weight", "down_proj.weight")):
                    nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.num_hidden_layers))

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def tied_names(self) -> dict[str, str]:
        """What a file may hold once more under another name: Qwen3-0.6B's has its head beside the table it is tied to."""
        return {"lm_head.weight": "embed_tokens.weight"} if self.config.tie_word_embeddings else {}

    @property
    def head_weight(self) -> Tensor:
        """The output head's matrix (V, C): the embedding table itself when tied."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """(B, T) token ids → (B, T, V) logits. `attention_mask` and `cache`: see `hidden_states`."""
        return self.logits(self.hidden_states(self.embed_tokens(input_ids), attention_mask, cache))

    def logits(self, hidden_states: Tensor) -> Tensor:
        """(…, C) → (…, V)."""
        return F.linear(hidden_states, self.head_weight)

    def hidden_states(
        self,
        embeddings: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        groups: Tensor | None = None,
        balance: list[Tensor] | None = None,
    ) -> Tensor:
        """(B, T, C_input) token embeddings → (B, T, C) after the final norm; or (M, C), of the flat `positions` (M,) alone.

        `attention_mask` is (B, S) over all tokens, those in the cache first: 0 padding, 1 a token, more for
        branches and packed samples (`causal_mask`). Without one, every row is a full sequence. A token's position is the
        number of tokens it sees before it, which is right for padding on either side, branches and packed samples alike.
        `prompt_lengths` (B,) is for dynamic NTK alone: how long the rows were when generation began, where neither this
        pass nor the cache's first one tells.
        `groups` (B, S) numbers tokens that see each other both ways (`bidirectional_mask`), which moves no position.
        In training, the load-balance loss of each layer of experts that is_trainable, a scalar, is appended to `balance`.
        """
        batch, length, _ = embeddings.shape
        start = cache.length if cache is not None else 0
        if attention_mask is None and (groups is not None or start > 0 and length > 1):
            attention_mask = torch.ones(
                batch, start + length, dtype=torch.int64, device=embeddings.device
            )
        if attention_mask is None:
            position_ids, mask = (
                torch.arange(start, start + length, device=embeddings.device).expand(batch, -1),
                None,
            )
        else:
            visible = causal_mask(attention_mask, length)  # (B, T, S)
            position_ids = visible.sum(dim=-1) - 1
            mask = (visible if groups is None else visible | bidirectional_mask(groups, length))[
                :, None
            ]
        options = dict(mask=mask, is_causal=mask is None and length > 1, cache=cache)
        if self.config.rope_type == "dynamic_ntk":
            if prompt_lengths is None:
                prompt_lengths = cache.prompt_lengths if start > 0 else position_ids.amax(dim=1) + 1
            if cache is not None:
                cache.prompt_lengths = prompt_lengths
        hidden_states = self.reducer(embeddings)
        if self.config.positions == "learned":
            hidden_states = hidden_states + self._learned(position_ids, start + length).to(
                hidden_states.dtype
            )
        else:
            options |= self._rotary(position_ids, prompt_lengths, hidden_states.dtype)
        if self.config.num_experts and attention_mask is not None:
            options["present"] = attention_mask[:, -length:] > 0
        hidden_states = self.dropout(hidden_states)
        for layer, block in enumerate(self.blocks):
            last = (
                layer == len(self.blocks) - 1
            )  # nobody looks at the other positions after its attention
            hidden_states = block(
                hidden_states, positions if last else None, layer=layer, **options
            )
            if self.config.num_experts:
                hidden_states, loss = hidden_states
                if balance is not None and loss is not None:
                    balance.append(loss)
        if cache is not None:
            cache.length += length
        return self.norm(hidden_states)

    def _learned(self, position_ids: Tensor, tokens: int) -> Tensor:
        """(B, T) positions in rows of `tokens` tokens → (B, T, C). Only in a row longer than the table may one lie beyond
        it, and only then is the device asked: packed rows are long, and their samples short."""
        limit = self.config.max_position_embeddings
        if tokens > limit and int(position_ids.max()) >= limit:
            raise NanoVLMError(
                f"a text of {int(position_ids.max()) + 1} tokens exceeds the decoder's {limit} positions; "
                "shorten it, in training with --max-length"
            )
        return self.position_embedding(position_ids)

    def _rotary(
        self, position_ids: Tensor, prompt_lengths: Tensor | None, dtype: torch.dtype
    ) -> dict[str, Any]:
        """What all layers turn queries and keys by, and multiply queries with: cast here, not once more in each of them.

        The first Qwen is trained with neither dynamic NTK nor log-n scaling. When it writes, its base stays that of the
        prompt, as long as the answer gets: the keys in the cache have been turned by it.
        """
        config, trained_length = self.config, self.config.original_max_position_embeddings
        theta, query_scale = config.rope_theta, None
        if config.rope_type == "dynamic_ntk" and not self.training:
            theta = ntk_theta(theta, config.head_dim, prompt_lengths, trained_length)
        turns = frequencies(config.head_dim, theta, position_ids.device)
        if config.rope_type == "llama3":
            turns = llama3_frequencies(
                turns,
                config.rope_factor,
                config.rope_low_freq_factor,
                config.rope_high_freq_factor,
                trained_length,
            )
        if config.logn_attention and not self.training:
            query_scale = logn_scale(position_ids, trained_length).to(dtype)
        cos, sin = rotary_embedding(position_ids, turns)
        return {"rotary": (cos.to(dtype), sin.to(dtype)), "query_scale": query_scale}

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """An empty cache for `batch` rows of up to `max_length` tokens, in the weights' dtype and on their device."""
        weight = self.embed_tokens.weight
        return KVCache(
            self.config.num_hidden_layers,
            batch,
            self.config.num_key_value_heads,
            self.config.head_dim,
            max_length,
            weight.dtype,
            weight.device,
        )
