"""Attention: masks, the key/value cache, the formula, and the module that both transformers use.

Lesson: lessons/source/02_attention.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.errors import NanoVLMError
from nanovlm.model.layers import RMSNorm
from nanovlm.model.rotary import rotate

WRITTEN_OUT_LIMIT = 2048 * 2048  # scores per head; more would take too much memory to keep
SEGMENT = 2**16  # how much the attention mask's numbers rise from one packed sample to the next


class KVCache:
    """Keys and values of the tokens read so far, allocated once for a whole generation."""

    def __init__(
        self, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        """`shape` is (layers, B, H_kv, max_length, D)."""
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.max_length = shape[3]
        self.length = 0  # tokens held; the language model advances it after its last block
        self.prompt_lengths: Tensor | None = None  # (B,) of the first pass, for dynamic NTK alone

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, H_kv, T, D) after the tokens held; returns views of all S, (B, H_kv, S, D)."""
        end = self.length + keys.shape[2]
        if end > self.max_length:
            raise NanoVLMError(
                f"the cache holds {self.max_length} tokens and cannot take token {end}; "
                "allocate a longer one"
            )
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, count: int) -> None:
        """Count the `count` tokens that every layer has stored."""
        self.length += count

    def longer(self, max_length: int, copies: int = 1) -> "KVCache":
        """A cache of `max_length` tokens that holds the same, `copies` of each row side by side."""
        layers, batch, heads, _, width = self.keys.shape
        shape = layers, batch * copies, heads, max_length, width
        cache = KVCache(shape, self.keys.dtype, self.keys.device)
        for ours, new in ((self.keys, cache.keys), (self.values, cache.values)):
            held = ours[:, :, None, :, : self.length]  # (layers, B, 1, H_kv, length, D)
            new.unflatten(1, (batch, copies))[..., : self.length, :] = held
        if self.prompt_lengths is not None:
            cache.prompt_lengths = self.prompt_lengths.repeat_interleave(copies)
        cache.length = self.length
        return cache

    def reorder(self, rows: Tensor, start: int) -> None:
        """Let the i-th row hold what row `rows[i]`, (B,), holds from token `start` on.

        What is before it stays, which is for rows that begin alike: copies of one prompt.
        """
        for tensor in (self.keys, self.values):
            later = tensor[:, :, :, start : self.length]
            later[:] = later.index_select(1, rows)


class StaticCache:
    """Keys and values in tensors that stay the same, for compiled steps of one token a row.

    Where `KVCache` gives views that grow, attention goes over all `max_length` places here, and the
    mask leaves out those that are not written yet. Even the place of the next token is on the
    device, so that all steps run the same code on the same addresses: CUDA can record one and
    replay it (as in meta-pytorch/gpt-fast).
    """

    def __init__(
        self, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        """`shape` is (layers, B, H_kv, max_length, D)."""
        layers, self.batch, _, self.max_length, _ = shape
        # Zeros, since what the mask leaves out still has the weight 0, and 0 · NaN is NaN.
        self.keys = [torch.zeros(shape[1:], dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        mask_shape = self.batch, self.max_length
        self.attention_mask = torch.ones(mask_shape, dtype=torch.int64, device=device)
        self.prompt_lengths = torch.ones(self.batch, dtype=torch.int64, device=device)
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        own = self.attention_mask, self.prompt_lengths, self.place
        for tensor in (*self.keys, *self.values, *own):
            torch._dynamo.mark_static_address(tensor)

    def has_room(self, rows: int, length: int) -> bool:
        """Whether it can hold so many rows of so many tokens."""
        return rows <= self.batch and length <= self.max_length

    def load(self, prompt: KVCache, attention_mask: Tensor | None, prompt_lengths: Tensor) -> None:
        """Take over a prompt of at most as many rows, with its attention mask (B, T)."""
        rows, length = prompt.keys.shape[1], prompt.length
        for ours, theirs in ((self.keys, prompt.keys), (self.values, prompt.values)):
            for layer, tensor in enumerate(ours):
                tensor.zero_()[:rows, :, :length] = theirs[layer, :, :, :length]
        self.attention_mask.fill_(1)
        if attention_mask is not None:
            self.attention_mask[:rows, :length] = attention_mask
        self.prompt_lengths[:rows] = prompt_lengths
        self.place.fill_(length)

    def mask_and_positions(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Of the next token: its additive mask, (B, 1, 1, max_length), and position, (B, 1)."""
        mask = causal_mask(self.attention_mask, self.place)  # (B, 1, max_length)
        return additive_mask(mask[:, None], dtype), mask.sum(dim=-1) - 1

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, H_kv, 1, D) in the next place; returns all places, (B, H_kv, max_length, D)."""
        self.keys[layer].index_copy_(2, self.place, keys)
        self.values[layer].index_copy_(2, self.place, values)
        return self.keys[layer], self.values[layer]

    def advance(self, count: int) -> None:
        """Move on by the `count` tokens that every layer has stored."""
        self.place += count


class AttentionInputs(NamedTuple):
    """What the attention of every block needs besides the hidden states, made once a pass."""

    mask: Tensor | None = None  # (B, 1, T, S), added to the scores (`additive_mask`)
    is_causal: bool = False  # the plain causal mask, where `mask` is None
    rotary: tuple[Tensor, Tensor] | None = None  # cosines and sines, (B, 1, T, D) each
    query_scale: Tensor | None = None  # (B, 1, T, 1), multiplied with the queries
    cache: KVCache | StaticCache | None = None


NO_INPUTS = AttentionInputs()  # every token attends to every other, without positions


def causal_mask(attention_mask: Tensor, queries: int | Tensor) -> Tensor:
    """The causal mask of rows with padding, branches and packed samples: (B, T, S) bool.

    It is True where one of T tokens of a row may attend to one of its S tokens. `queries` says
    which T these are: the last so many, or those at the indices (T,), the same in each row.
    `attention_mask` is 0 for padding and 1 for a token, as everywhere else. Tokens numbered 2, 3, …
    form branches: a token attends to earlier tokens of its own number and to those numbered 1, so a
    row [1 1 1 2 2 3 3] is one prefix with two independent continuations. Where several samples are
    packed into one row, the numbers of the k-th one, counted from 0, are raised by k · SEGMENT, and
    the mask is block-diagonal: a token attends to nothing of another segment. Padding attends to
    itself alone, which keeps the softmax finite.

    The result takes a byte a pair, 4 MiB for a row of 2,048 tokens.
    """
    length = attention_mask.shape[1]
    keys, index = attention_mask[:, None, :], torch.arange(length, device=attention_mask.device)
    if isinstance(queries, int):
        query, query_index = attention_mask[:, -queries:, None], index[-queries:, None]
    else:
        query, query_index = attention_mask.index_select(1, queries)[..., None], queries[:, None]
    earlier = index <= query_index  # (T, S)
    same = index == query_index
    prefix = query // SEGMENT * SEGMENT + 1  # the number that all branches of a segment share
    return (earlier & (query > 0) & ((keys == query) | (keys == prefix))) | same


def bidirectional_mask(groups: Tensor, queries: int) -> Tensor:
    """Which tokens attend to each other both ways: (B, S) integers → (B, queries, S) bool.

    Tokens of a row with the same number above 0 attend to each other whatever their order; 0 is no
    group. The result is added to `causal_mask`, as in a prefix language model (Raffel et al. 2020).
    """
    query = groups[:, -queries:, None]
    return (groups[:, None, :] == query) & (query > 0)


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores: 0 where `allowed`, (…) bool, is true, and -∞ elsewhere."""
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, -torch.inf)


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """softmax(Q Kᵀ / √D) V: queries (B, H, T, D), keys and values (B, H_kv, S, D) → (B, H, T, D).

    H is a multiple of H_kv: consecutive query heads share a key head. `mask`, (B or 1, 1, T, S), is
    added to the scores, or is bool, true where a query may attend; `is_causal` stands for the
    triangular one. PyTorch's fused kernels do the work, except where the formula written out is two
    to four times as fast: on a CPU in half precision, and for a single query.
    """
    batch, num_heads, length, head_dim = queries.shape
    if mask is not None:
        is_bool = mask.dtype == torch.bool
        mask = additive_mask(mask, queries.dtype) if is_bool else mask.to(queries.dtype)
    half_on_cpu = queries.device.type == "cpu" and queries.dtype != torch.float32
    if half_on_cpu and length == 1:  # without oneDNN (`generate.py`) fp32 is 5 times as fast
        wide = attend(queries.float(), keys.float(), values.float(), mask)
        return wide.to(queries.dtype)
    if (length > 1 and not half_on_cpu) or length * keys.shape[2] > WRITTEN_OUT_LIMIT:
        return _attend_fused(queries, keys, values, mask, is_causal)
    # Query heads that share a key head are stacked along T, so that one product serves them all.
    queries = queries * head_dim**-0.5
    stacked = num_heads // keys.shape[1] * length
    queries = queries.reshape(batch, keys.shape[1], stacked, head_dim)  # (B, H_kv, H/H_kv · T, D)
    scores = queries @ keys.transpose(-1, -2)
    scores = scores.view(batch, num_heads, length, keys.shape[2])  # (B, H, T, S)
    if is_causal:
        mask = torch.full_like(scores[0, 0], -torch.inf).triu(1)
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(dim=-1).view(batch, keys.shape[1], stacked, keys.shape[2])
    return (weights @ values).view(batch, num_heads, length, head_dim)


def _attend_fused(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, is_causal: bool
) -> Tensor:
    """`attend` by one of PyTorch's kernels that never hold all scores."""
    shared = queries.shape[1] // keys.shape[1]
    flash = mask is None and queries.dtype != torch.float32
    if shared > 1 and queries.device.type == "cuda" and not flash:
        # Of CUDA's kernels only flash attention shares key heads below Hopper, and it takes neither
        # masks nor fp32. PyTorch would write the formula out, in fp32, and keep all scores.
        keys, values = (heads.repeat_interleave(shared, dim=1) for heads in (keys, values))
    return F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
        is_causal=is_causal,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )


@dataclass(frozen=True)
class AttentionConfig:
    """The shape of an attention module; head_dim need not be hidden_size / num_heads (Qwen3)."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool
    output_bias: bool
    qk_norm_eps: float | None = None  # RMS-normalise queries and keys per head, before the rotation

    @classmethod
    def multi_head(cls, hidden_size: int, num_heads: int) -> "AttentionConfig":
        """Heads that divide the hidden size, with all biases, as in vision transformers."""
        return cls(hidden_size, num_heads, num_heads, hidden_size // num_heads, True, True)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017).

    It is grouped-query attention (Ainslie et al. 2023) where `num_kv_heads` < `num_heads`.
    """

    def __init__(self, config: AttentionConfig, layer: int = 0) -> None:
        """`layer` is the number of the block it belongs to: its place in the cache."""
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim, self.layer = config.head_dim, layer
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.out_proj = nn.Linear(width, config.hidden_size, bias=config.output_bias)
        self.q_norm = self.k_norm = nn.Identity()
        if config.qk_norm_eps is not None:
            self.q_norm = RMSNorm(config.head_dim, config.qk_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.qk_norm_eps)

    def forward(self, hidden_states: Tensor, inputs: AttentionInputs = NO_INPUTS) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        queries = self.q_norm(self.heads(self.q_proj(hidden_states)))  # (B, H, T, D)
        keys = self.k_norm(self.heads(self.k_proj(hidden_states)))  # (B, H_kv, T, D)
        values = self.heads(self.v_proj(hidden_states))  # (B, H_kv, T, D)
        if inputs.rotary is not None:
            queries, keys = rotate(queries, inputs.rotary), rotate(keys, inputs.rotary)
        if inputs.query_scale is not None:
            queries = queries * inputs.query_scale
        if inputs.cache is not None:
            keys, values = inputs.cache.append(self.layer, keys, values)  # (B, H_kv, S, D)
        attended = attend(queries, keys, values, inputs.mask, inputs.is_causal)  # (B, H, T, D)
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def heads(self, projected: Tensor) -> Tensor:
        """(B, T, heads · D) → (B, heads, T, D)."""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
