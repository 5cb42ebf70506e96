"""Rotary positions (RoPE, Su et al. 2021), and what published models do beyond the length they were first trained at."""

import math

import torch
from torch import Tensor


def frequencies(
    head_dim: int, theta: float | Tensor, device: torch.device | str | None = None
) -> Tensor:
    """Radians by which a position turns each pair of a head, (D/2,) in fp32; for bases (B, 1, 1, 1), (B, 1, 1, D/2)."""
    return theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)


def llama3_frequencies(
    frequencies: Tensor, factor: float, low: float, high: float, length: int
) -> Tensor:
    """LLaMA 3.1's scaling: a pair that turns fewer than `low` times in the `length` first trained at becomes `factor` times
    as slow, one that turns more than `high` times stays, and what lies between is blended."""
    turns = frequencies * length / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def ntk_theta(theta: float, head_dim: int, lengths: Tensor, trained_length: int) -> Tensor:
    """The first Qwen's dynamic NTK (Bai et al. 2023): the base grows with the power of two that a row's length (B,) reaches
    over the trained one. Up to that it stays. Returns (B, 1, 1, 1) in fp32."""
    doublings = (lengths.float() / trained_length).log2().ceil().clamp(min=0)
    alpha = 2 ** (doublings + 1) - 1  # 1, 3, 7, … for up to 1, 2, 4, … times the trained length
    return theta * (alpha ** (head_dim / (head_dim - 2)))[:, None, None, None]


def logn_scale(position_ids: Tensor, trained_length: int) -> Tensor:
    """What a query is multiplied with, so that attention over more tokens stays as sharp (Su 2021; Bai et al. 2023): the
    logarithm of the tokens it sees, to the base of the trained length, and 1 up to that. (B, T) → (B, 1, T, 1) in fp32."""
    seen = position_ids[:, None, :, None].float() + 1
    return (seen.log() / math.log(trained_length)).clamp(min=1)


def rotary_embedding(position_ids: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines: (B, T) positions → two (B, 1, T, D) tables in fp32."""
    angles = position_ids[:, None, :, None].float() * frequencies  # (B, 1, T, D/2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(heads: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x_i, x_{i+D/2}) of (B, H, T, D) by its position's angle."""
    cos, sin = (table.to(heads.dtype) for table in rotary)
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin
