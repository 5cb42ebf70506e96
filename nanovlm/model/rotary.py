"""Rotary position embeddings (RoPE, Su et al. 2021), and their use beyond the trained length.

Lesson: lessons/source/07_rotary_positions.py.
"""

import math

import torch
from torch import Tensor


def rotary_frequencies(
    head_dim: int, theta: float | Tensor, device: torch.device | str | None = None
) -> Tensor:
    """Radians by which one position rotates each pair of a head, in fp32.

    (D/2,) for one base `theta`; (B, 1, 1, D/2) for one of each row, (B, 1, 1, 1).
    """
    return theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)


def llama3_frequencies(
    frequencies: Tensor, factor: float, low: float, high: float, length: int
) -> Tensor:
    """LLaMA 3.1's scaling of `frequencies` to `factor` times the trained `length`.

    A pair with fewer than `low` full rotations in `length` positions is slowed down by `factor`,
    one with more than `high` stays, and those between are interpolated.
    """
    rotations = frequencies * length / (2 * math.pi)
    kept = ((rotations - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def ntk_theta(theta: float, head_dim: int, lengths: Tensor, trained_length: int) -> Tensor:
    """Dynamic NTK of the first Qwen (Bai et al. 2023): the base of each row, (B, 1, 1, 1) in fp32.

    The base grows with the power of two by which a row's length (B,) exceeds the trained one; up to
    that it stays.
    """
    doublings = (lengths.float() / trained_length).log2().ceil().clamp(min=0)
    alpha = 2 ** (doublings + 1) - 1  # 1, 3, 7, … for up to 1, 2, 4, … times the trained length
    return theta * (alpha ** (head_dim / (head_dim - 2)))[:, None, None, None]


def logn_scale(position_ids: Tensor, trained_length: int) -> Tensor:
    """The factor of each query that keeps attention over more tokens as sharp.

    Su 2021; Bai et al. 2023. It is the logarithm of the number of tokens attended to, to the base
    of the trained length, and 1 up to that: (B, T) → (B, 1, T, 1) in fp32.
    """
    attended = position_ids[:, None, :, None].float() + 1
    return (attended.log() / math.log(trained_length)).clamp(min=1)


def rotary_embedding(position_ids: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines: (B, T) positions → two (B, 1, T, D) tables in fp32."""
    angles = position_ids[:, None, :, None].float() * frequencies  # (B, 1, T, D/2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(heads: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (x_i, x_{i+D/2}) of (B, H, T, D) by its position's angle."""
    cos, sin = (table.to(heads.dtype) for table in rotary)
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin
