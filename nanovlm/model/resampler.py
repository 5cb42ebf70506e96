"""Learned queries that attend to all patches of an image: any number in, a fixed number out.

Lesson: lessons/source/08_projectors.py.
"""

import math

import torch
from torch import Tensor, nn

from nanovlm.model.attention import Attention, AttentionConfig, attend
from nanovlm.model.layers import resize_positions, sine_cosine_positions

HEAD_DIM = 128  # of every published one


class CrossAttention(Attention):
    """Attention of one sequence to another, with the matrices of `Attention`."""

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Queries (B or 1, T, C), keys and values (B, S, C) → (B, T, C)."""
        queries = self.q_norm(self.heads(self.q_proj(queries)))  # (B or 1, H, T, D)
        if len(queries) < len(keys):  # copied: fused kernels take no batch stride of 0
            queries = queries.repeat(len(keys), 1, 1, 1)
        keys = self.k_norm(self.heads(self.k_proj(keys)))  # (B, H_kv, S, D)
        values = self.heads(self.v_proj(values))
        return self.out_proj(attend(queries, keys, values).transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """Qwen-VL's resampler (Bai et al. 2023): learned queries, one layer of cross-attention.

    The queries form a square grid, as the patches do. Fixed sine–cosine positions are added to
    queries and keys, not to values; the keys' table is the queries' one, resized to the patches'
    grid.
    """

    def __init__(self, hidden_size: int, num_queries: int, output_size: int, eps: float) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_queries, output_size) * 0.02)
        self.query_norm = nn.LayerNorm(output_size, eps=eps)
        self.kv_proj = nn.Linear(hidden_size, output_size, bias=False)
        self.kv_norm = nn.LayerNorm(output_size, eps=eps)
        num_heads = max(1, output_size // HEAD_DIM)
        self.attention = CrossAttention(AttentionConfig.multi_head(output_size, num_heads))
        self.norm = nn.LayerNorm(output_size, eps=eps)
        projection = torch.randn(output_size, output_size) * output_size**-0.5
        self.projection = nn.Parameter(projection)  # multiplied from the right

    def forward(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """(N, rows · columns, hidden_size) → (N, num_queries, output_size)."""
        side = math.isqrt(len(self.queries))
        positions = sine_cosine_positions(side, self.queries.shape[1], patches.device)
        queries = self.query_norm(self.queries)[None] + positions.to(self.queries.dtype)
        values = self.kv_norm(self.kv_proj(patches))  # (N, P, C)
        keys = values + resize_positions(positions, side, rows, columns).to(values.dtype)
        return self.norm(self.attention(queries, keys, values)) @ self.projection
