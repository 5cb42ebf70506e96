"""The one attention both towers use, its key/value cache, and the rule for who sees whom."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.errors import NanoVLMError
from nanovlm.model.layers import RMSNorm
from nanovlm.model.rotary import rotate

WRITTEN_OUT_LIMIT = 2048 * 2048  # scores a head above which they are not worth holding
SEGMENT = 2**16  # what the attention mask's numbers go up by from one packed sample to the next


class KVCache:
    """Keys and values of the tokens read so far, (B, H_kv, S, D) a layer, allocated once for the whole generation."""

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (num_layers, batch, num_kv_heads, max_length, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.max_length = max_length
        self.length = 0  # tokens held; the decoder advances it once all layers have appended
        self.prompt_lengths: Tensor | None = (
            None  # (B,) how long the rows were at the first pass (`LanguageModel.hidden_states`)
        )

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, H_kv, T, D) after the tokens held and return views of everything up to and including them."""
        end = self.length + keys.shape[2]
        if end > self.max_length:
            raise NanoVLMError(
                f"the cache holds {self.max_length} tokens and cannot take token {end}; allocate it longer"
            )
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def causal_mask(attention_mask: Tensor, queries: int) -> Tensor:
    """Which of S tokens each of the last `queries` tokens of a row may look at: (B, S) integers → (B, queries, S) bool.

    `attention_mask` is 0 for padding and 1 for a token, as everywhere else; tokens numbered 2, 3, … form branches.
    A token sees earlier tokens of its own number and those numbered 1. So a row [1 1 1 2 2 3 3] is one prefix with two
    continuations that do not see each other. Where several samples are packed into one row, the k-th one's numbers,
    counted from 0, are raised by k · SEGMENT: a token sees nothing of another segment.
    Padding sees itself alone, only to keep the softmax finite.

    The result takes a byte a pair, 4 MiB for a row of 2,048 tokens; it is made once a forward pass, for all layers.
    """
    length = attention_mask.shape[1]
    keys, query = attention_mask[:, None, :], attention_mask[:, -queries:, None]
    index = torch.arange(length, device=attention_mask.device)
    earlier = index <= index[-queries:, None]  # (queries, S)
    same = index == index[-queries:, None]
    prefix = query // SEGMENT * SEGMENT + 1  # what the own segment's branches have in common
    return (earlier & (query > 0) & ((keys == query) | (keys == prefix))) | same


def bidirectional_mask(groups: Tensor, queries: int) -> Tensor:
    """Which of S tokens each of the last `queries` sees for being in its group: (B, S) integers → (B, queries, S) bool.

    Tokens of a row with the same number above 0 see each other whatever their order; those with 0 are in no group. It
    adds to what `causal_mask` lets a token see, as the prefix of a prefix LM does (Raffel et al. 2020).
    """
    query = groups[:, -queries:, None]
    return (groups[:, None, :] == query) & (query > 0)


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """softmax(Q Kᵀ / √D) V: queries (B, H, T, D), keys and values (B, H_kv, S, D) → (B, H, T, D).

    H is a multiple of H_kv: consecutive query heads share a key head. `mask` is (B or 1, 1, T, S) bool, True where a
    query may look; `is_causal` is the triangular one. On a CPU in half precision, and for a single query
    anywhere, the formula is written out: on a CPU it is two to four times as fast as PyTorch's fused kernel, which does
    the rest.
    """
    batch, num_heads, length, head_dim = queries.shape
    half_on_cpu = queries.device.type == "cpu" and queries.dtype != torch.float32
    if (length > 1 and not half_on_cpu) or length * keys.shape[2] > WRITTEN_OUT_LIMIT:
        return F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            is_causal=is_causal,
            enable_gqa=num_heads != keys.shape[1],
        )
    # The query heads that share a key head stand one below the other, so that one product serves them all.
    queries = (queries * head_dim**-0.5).reshape(
        batch, keys.shape[1], -1, head_dim
    )  # (B, H_kv, H/H_kv · T, D)
    scores = (queries @ keys.transpose(-1, -2)).view(batch, num_heads, length, -1)
    if is_causal:
        mask = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, -torch.inf)
    weights = scores.softmax(dim=-1).view(batch, keys.shape[1], -1, keys.shape[2])
    return (weights @ values).view(batch, num_heads, length, head_dim)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017), grouped-query when `num_kv_heads` < `num_heads` (Ainslie et al. 2023).

    The head width may differ from `hidden_size / num_heads` (Qwen3). With `qk_norm_eps`, queries and keys are
    RMS-normalised per head before the rotation.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        qkv_bias: bool,
        output_bias: bool,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_dim = head_dim or hidden_size // num_heads
        self.q_proj = nn.Linear(hidden_size, self.num_heads * self.head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, self.num_kv_heads * self.head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, self.num_kv_heads * self.head_dim, bias=qkv_bias)
        self.out_proj = nn.Linear(self.num_heads * self.head_dim, hidden_size, bias=output_bias)
        if qk_norm_eps is not None:
            self.q_norm = RMSNorm(self.head_dim, qk_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, qk_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(
        self,
        hidden_states: Tensor,
        *,
        rotary: tuple[Tensor, Tensor] | None = None,
        query_scale: Tensor | None = None,
        mask: Tensor | None = None,
        is_causal: bool = False,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """(B, T, C) → (B, T, C). `mask` is (B, 1, T, S) bool, True where a query may look; S counts cached tokens too.
        `query_scale` (B, 1, T, 1) multiplies the queries."""
        batch, length, _ = hidden_states.shape
        queries = self.q_norm(
            self._heads(self.q_proj(hidden_states), self.num_heads)
        )  # (B, H, T, D)
        keys = self.k_norm(
            self._heads(self.k_proj(hidden_states), self.num_kv_heads)
        )  # (B, H_kv, T, D)
        values = self._heads(self.v_proj(hidden_states), self.num_kv_heads)
        if rotary is not None:
            queries, keys = rotate(queries, rotary), rotate(keys, rotary)
        if query_scale is not None:
            queries = queries * query_scale
        if cache is not None:
            keys, values = cache.append(layer, keys, values)
        attended = attend(queries, keys, values, mask, is_causal)  # (B, H, T, D)
        return self.out_proj(attended.transpose(1, 2).reshape(batch, length, -1))

    def _heads(self, projected: Tensor, num_heads: int) -> Tensor:
        return projected.unflatten(-1, (num_heads, self.head_dim)).transpose(1, 2)
