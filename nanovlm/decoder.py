"""The language model: token ids → logits. Qwen2, Qwen2.5 and Qwen3 (dense)."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.attention import Attention, KVCache, RMSNorm, rotary_embedding, visibility
from nanovlm.config import check_divides, check_numbers, from_dict, read_hf_config, require, unknown_key
from nanovlm.weights.pretrained import TEXT_FAMILIES, load_pretrained


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

    def __post_init__(self) -> None:
        check_numbers(self)
        check_divides(self, "num_attention_heads", "num_key_value_heads")

    @classmethod
    def from_hf(cls, config: dict) -> "DecoderConfig":
        """Read the `config.json` of a Qwen2, Qwen2.5 or Qwen3 folder; older and newer spellings of RoPE's settings."""
        qwen3 = config.get("model_type") == "qwen3"
        config = read_hf_config(config, ("qwen2", "qwen3"), defaults=dict(
            vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=None, head_dim=None, hidden_act="silu", rms_norm_eps=1e-6, rope_scaling=None,
            rope_theta=None, max_position_embeddings=32768, tie_word_embeddings=False, attention_bias=False,
            use_sliding_window=False, rope_parameters={}, layer_types=[],
        ), ignored=("initializer_range", "use_cache", "attention_dropout", "sliding_window", "max_window_layers",
                    "use_mrope"))
        require(config, hidden_act="silu", use_sliding_window=False, rope_scaling=None)
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
        where = "config.json: rope_parameters"
        require(config["rope_parameters"], where, rope_type="default", partial_rotary_factor=1.0)
        for key in config["rope_parameters"]:
            if key not in rope:
                raise unknown_key(key, rope, where)
        rope |= config["rope_parameters"]
        require({"layer_types": [kind for kind in config["layer_types"] if kind != "full_attention"]}, layer_types=[])
        if qwen3:
            require(config, attention_bias=False)
        heads = config["num_attention_heads"]
        return from_dict(cls, dict(
            qkv_bias=not qwen3, qk_norm=qwen3, num_key_value_heads=config["num_key_value_heads"] or heads,
            head_dim=config["head_dim"] or (128 if qwen3 else config["hidden_size"] // max(heads, 1)),
            rope_theta=config["rope_theta"] or rope["rope_theta"],
            **{name: config[name] for name in (
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")}), where="config.json")

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
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

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
            qkv_bias=config.qkv_bias, output_bias=False, qk_norm_eps=config.rms_norm_eps if config.qk_norm else None)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, hidden_states: Tensor, positions: Tensor | None = None, **attention) -> Tensor:
        """(B, T, C) → (B, T, C); or, past the attention, only the flat `positions` (M,) of (B, T) → (M, C)."""
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states), **attention)
        if positions is not None:
            hidden_states = hidden_states.flatten(0, 1).index_select(0, positions)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class Decoder(nn.Module):
    """A causal transformer with rotary positions (Yang et al. 2024, 2025: Qwen2, Qwen2.5, Qwen3)."""

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
                      positions: Tensor | None = None) -> Tensor:
        """(B, T, C) token embeddings → (B, T, C) after the final norm; or (M, C), of the flat `positions` (M,) alone.

        `attention_mask` is (B, S) over all tokens, those in the cache first: 0 padding, 1 a token, more for
        branches and packed samples (`visibility`). Without one, every row is a full sequence. A token's position is the
        number of tokens it sees before it, which is right for padding on either side, branches and packed samples alike.
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
        cos, sin = rotary_embedding(position_ids, self.config.head_dim, self.config.rope_theta)
        rotary = cos.to(embeddings.dtype), sin.to(embeddings.dtype)  # cast here, not once more in every layer
        hidden_states = embeddings
        for layer, block in enumerate(self.blocks):
            last = layer == len(self.blocks) - 1  # nobody looks at the other positions after its attention
            hidden_states = block(hidden_states, positions if last else None, rotary=rotary, mask=mask,
                                  is_causal=mask is None and length > 1, cache=cache, layer=layer)
        if cache is not None:
            cache.length += length
        return self.norm(hidden_states)

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """An empty cache for `batch` rows of up to `max_length` tokens, in the weights' dtype and on their device."""
        weight = self.embed_tokens.weight
        return KVCache(self.config.num_hidden_layers, batch, self.config.num_key_value_heads, self.config.head_dim,
                       max_length, weight.dtype, weight.device)
