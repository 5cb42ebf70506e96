"""The language model: token ids → logits. Qwen from its first generation to Qwen3 (dense), LLaMA, SmolLM2, Mistral."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.attention import Attention, KVCache, RMSNorm, visibility
from nanovlm.config import check_divides, check_numbers, from_dict
from nanovlm.errors import NanoVLMError
from nanovlm.rotary import frequencies, llama3_frequencies, logn_scale, ntk_theta, rotary_embedding
from nanovlm.weights.pretrained import TEXT_FAMILIES, load_pretrained
from nanovlm.weights.text_configs import read_text_config

ROPE_TYPES = ("default", "llama3", "dynamic_ntk")


@dataclass(frozen=True)
class DecoderConfig:
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
    logn_attention: bool = False  # beyond that length queries grow with the logarithm of the tokens they see

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.rope_type not in ROPE_TYPES:
            raise NanoVLMError(f"DecoderConfig: rope_type {self.rope_type!r} is not known; take one of {', '.join(ROPE_TYPES)}")
        if (self.rope_type != "default" or self.logn_attention) and self.original_max_position_embeddings < 2:
            raise NanoVLMError(f"DecoderConfig: rope_type {self.rope_type!r} needs original_max_position_embeddings, "
                               "the length the model was first trained at")
        if self.rope_high_freq_factor <= self.rope_low_freq_factor:
            raise NanoVLMError(f"DecoderConfig: rope_high_freq_factor = {self.rope_high_freq_factor} is not above "
                               f"rope_low_freq_factor = {self.rope_low_freq_factor}")
        check_divides(self, "num_attention_heads", "num_key_value_heads")

    @classmethod
    def from_hf(cls, config: dict) -> "DecoderConfig":
        """Read the `config.json` of a folder of any family in TEXT_FAMILIES; older and newer spellings of RoPE's settings."""
        return from_dict(cls, read_text_config(config), where="config.json")

    @classmethod
    def from_dict(cls, config: dict) -> "DecoderConfig":
        return from_dict(cls, config)


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

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, value = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        if gate.requires_grad or value.requires_grad:
            return self.down_proj(_GatedProduct.apply(gate, value))
        return self.down_proj(F.silu(gate, inplace=True).mul_(value))  # nobody needs the gate again


class DecoderBlock(nn.Module):
    """Pre-norm causal attention, then the gated MLP."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(
            config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim,
            qkv_bias=config.qkv_bias, output_bias=config.output_bias,
            qk_norm_eps=config.rms_norm_eps if config.qk_norm else None)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, hidden_states: Tensor, positions: Tensor | None = None, **attention) -> Tensor:
        """(B, T, C) → (B, T, C); or, past the attention, only the flat `positions` (M,) of (B, T) → (M, C)."""
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states), **attention)
        if positions is not None:
            hidden_states = hidden_states.flatten(0, 1).index_select(0, positions)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class Decoder(nn.Module):
    """A causal transformer with rotary positions (Touvron et al. 2023: LLaMA; Bai et al. 2023: Qwen; Yang et al. 2024,
    2025: Qwen2, Qwen2.5, Qwen3)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self._initialise)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None) -> "Decoder":
        """Load a hub folder, one file or sharded; any missing, unexpected or mis-shaped tensor is an error."""
        return load_pretrained(cls, DecoderConfig, folder, TEXT_FAMILIES, dtype)

    @property
    def head_weight(self) -> Tensor:
        """The output head's matrix (V, C): the embedding table itself when tied."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """(B, T) token ids → (B, T, V) logits. `attention_mask` and `cache`: see `hidden_states`."""
        return self.logits(self.hidden_states(self.embed_tokens(input_ids), attention_mask, cache))

    def logits(self, hidden_states: Tensor) -> Tensor:
        """(…, C) → (…, V)."""
        return F.linear(hidden_states, self.head_weight)

    def hidden_states(self, embeddings: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None,
                      positions: Tensor | None = None, prompt_lengths: Tensor | None = None) -> Tensor:
        """(B, T, C) token embeddings → (B, T, C) after the final norm; or (M, C), of the flat `positions` (M,) alone.

        `attention_mask` is (B, S) over all tokens, those in the cache first: 0 padding, 1 a token, more for
        branches and packed samples (`visibility`). Without one, every row is a full sequence. A token's position is the
        number of tokens it sees before it, which is right for padding on either side, branches and packed samples alike.
        `prompt_lengths` (B,) is for dynamic NTK alone: how long the rows were when generation began, where neither this
        pass nor the cache's first one tells.
        """
        batch, length, _ = embeddings.shape
        start = cache.length if cache is not None else 0
        if attention_mask is None:
            position_ids, mask = torch.arange(start, start + length, device=embeddings.device).expand(batch, -1), None
            if start > 0 and length > 1:
                mask = visibility(position_ids.new_ones(1, start + length), length)[:, None]
        else:
            visible = visibility(attention_mask, length)  # (B, T, S)
            position_ids, mask = visible.sum(dim=-1) - 1, visible[:, None]
        if prompt_lengths is None:
            prompt_lengths = cache.prompt_lengths if start > 0 else position_ids.amax(dim=1) + 1
        if cache is not None:
            cache.prompt_lengths = prompt_lengths
        rotary, query_scale = self._rotary(position_ids, prompt_lengths, embeddings.dtype)
        hidden_states = embeddings
        for layer, block in enumerate(self.blocks):
            last = layer == len(self.blocks) - 1  # nobody looks at the other positions after its attention
            hidden_states = block(hidden_states, positions if last else None, rotary=rotary, query_scale=query_scale,
                                  mask=mask, is_causal=mask is None and length > 1, cache=cache, layer=layer)
        if cache is not None:
            cache.length += length
        return self.norm(hidden_states)

    def _rotary(self, position_ids: Tensor, prompt_lengths: Tensor,
                dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
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
            turns = llama3_frequencies(turns, config.rope_factor, config.rope_low_freq_factor,
                                       config.rope_high_freq_factor, trained_length)
        if config.logn_attention and not self.training:
            query_scale = logn_scale(position_ids, trained_length).to(dtype)
        cos, sin = rotary_embedding(position_ids, turns)
        return (cos.to(dtype), sin.to(dtype)), query_scale

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """An empty cache for `batch` rows of up to `max_length` tokens, in the weights' dtype and on their device."""
        weight = self.embed_tokens.weight
        return KVCache(self.config.num_hidden_layers, batch, self.config.num_key_value_heads, self.config.head_dim,
                       max_length, weight.dtype, weight.device)
