"""From the patch vectors of an image to a fixed number of vectors: learned queries look at them (Qwen-VL, Bai et al. 2023)."""

import math

import torch
from torch import Tensor, nn

from nanovlm.model.attention import Attention, attend
from nanovlm.model.layers import resize_positions, sine_cosine_positions

HEAD_SIZE = 128  # of an attention head, as in every published one


class CrossAttention(Attention):
    """Attention of one sequence to another, with the matrices of `Attention`."""

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Queries (B or 1, T, C), keys and values (B, S, C) → (B, T, C)."""
        queries = self.q_norm(self._heads(self.q_proj(queries), self.num_heads)).expand(
            len(keys), -1, -1, -1
        )  # (B, H, T, D)
        keys = self.k_norm(self._heads(self.k_proj(keys), self.num_kv_heads))  # (B, H_kv, S, D)
        values = self._heads(self.v_proj(values), self.num_kv_heads)
        return self.out_proj(attend(queries, keys, values).transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """`num_queries` learned queries, a square of them, each over its part of the image: one layer of cross-attention.

    Fixed sine–cosine positions tell queries and keys, not values, where they are. The patches' are the queries', resized.
    """

    def __init__(self, hidden_size: int, num_queries: int, output_size: int, eps: float) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_queries, output_size) * 0.02)
        self.query_norm = nn.LayerNorm(output_size, eps=eps)
        self.kv_proj = nn.Linear(hidden_size, output_size, bias=False)
        self.kv_norm = nn.LayerNorm(output_size, eps=eps)
        self.attention = CrossAttention(
            output_size, max(1, output_size // HEAD_SIZE), qkv_bias=True, output_bias=True
        )
        self.norm = nn.LayerNorm(output_size, eps=eps)
        self.projection = nn.Parameter(
            torch.randn(output_size, output_size) * output_size**-0.5
        )  # applied from the right

    def forward(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """(N, rows · columns, hidden_size) → (N, num_queries, output_size)."""
        side = math.isqrt(len(self.queries))
        positions = sine_cosine_positions(side, self.queries.shape[1], patches.device)
        queries = self.query_norm(self.queries)[None] + positions.to(self.queries.dtype)
        values = self.kv_norm(self.kv_proj(patches))  # (N, P, C)
        keys = values + resize_positions(positions, side, rows, columns).to(values.dtype)
        return self.norm(self.attention(queries, keys, values)) @ self.projection
