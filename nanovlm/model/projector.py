"""Projectors: patch vectors of the eyes → visual tokens of the voice, one small class each.

To add one, write a class with this constructor and `num_tokens`, and add a line to PROJECTORS.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.errors import NanoVLMError
from nanovlm.model.layers import ACTIVATIONS
from nanovlm.model.resampler import CrossAttention
from nanovlm.utils.config import check_numbers


@dataclass(frozen=True)
class ProjectorConfig:
    """`kind` is a name of PROJECTORS. `grid` is the side of the downsampled patch grid (bilinear), `scale` the
    side of the square of patches merged into one token (pixel_shuffle), `activation` what stands between two matrices
    (a name of ACTIVATIONS), `bias` whether a single matrix has one (linear, pixel_shuffle). `num_queries` visual tokens
    look at the patches with `num_heads` heads (resampler)."""

    kind: str = "mlp"
    grid: int = 8
    scale: int = 2
    activation: str = "gelu"
    bias: bool = True
    num_queries: int = 32
    num_heads: int = 8

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.activation not in ACTIVATIONS:
            raise NanoVLMError(
                f"ProjectorConfig: activation {self.activation!r} is not known; take one of "
                + ", ".join(ACTIVATIONS)
            )


class LinearProjector(nn.Module):
    """One matrix, one token a patch (LLaVA: Liu et al. 2023)."""

    def __init__(self, vision_width: int, text_width: int, config: ProjectorConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(vision_width, text_width, bias=config.bias)

    def num_tokens(self, num_patches: int) -> int:
        return num_patches

    def forward(self, patches: Tensor) -> Tensor:
        """(N, P, C_vision) → (N, P, C_text)."""
        return self.linear(patches)


class MLPProjector(nn.Module):
    """Two layers with a GELU between, one token a patch (LLaVA-1.5: Liu et al. 2024), or with another activation."""

    def __init__(self, vision_width: int, text_width: int, config: ProjectorConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.up = nn.Linear(vision_width, text_width)
        self.down = nn.Linear(text_width, text_width)

    def num_tokens(self, num_patches: int) -> int:
        return num_patches

    def forward(self, patches: Tensor) -> Tensor:
        """(N, P, C_vision) → (N, P, C_text)."""
        return self.down(self.activation(self.up(patches)))


class PixelShuffleProjector(nn.Module):
    """Each square of scale × scale patches becomes one long vector, then one matrix (Shi et al. 2016; Idefics3)."""

    def __init__(self, vision_width: int, text_width: int, config: ProjectorConfig) -> None:
        super().__init__()
        self.scale = config.scale
        self.linear = nn.Linear(vision_width * config.scale**2, text_width, bias=config.bias)

    def num_tokens(self, num_patches: int) -> int:
        side = square_side(num_patches)
        if side % self.scale:
            raise NanoVLMError(
                f"a grid of {side}×{side} patches is not made of {self.scale}×{self.scale} squares; "
                "change the image size or the projector's scale"
            )
        return num_patches // self.scale**2

    def forward(self, patches: Tensor) -> Tensor:
        """(N, P, C_vision) → (N, P / scale², C_text), row by row."""
        return self.linear(pixel_shuffle(patches, self.scale))


class BilinearProjector(MLPProjector):
    """The grid is averaged down to grid × grid, then the two-layer MLP: fewer tokens at no parameters."""

    def __init__(self, vision_width: int, text_width: int, config: ProjectorConfig) -> None:
        super().__init__(vision_width, text_width, config)
        self.grid = config.grid

    def num_tokens(self, num_patches: int) -> int:
        if square_side(num_patches) < self.grid:
            raise NanoVLMError(
                f"{num_patches} patches cannot be averaged down to {self.grid}×{self.grid}; use a smaller grid"
            )
        return self.grid**2

    def forward(self, patches: Tensor) -> Tensor:
        """(N, P, C_vision) → (N, grid², C_text). The antialiased filter weighs every patch, also at uneven ratios."""
        side = square_side(patches.shape[1])
        grid = patches.transpose(1, 2).unflatten(2, (side, side)).float()
        grid = F.interpolate(grid, (self.grid, self.grid), mode="bilinear", antialias=True)
        return super().forward(grid.flatten(2).transpose(1, 2).to(patches.dtype))


class ResamplerProjector(nn.Module):
    """Learned queries look at all patches, so that any number of them becomes `num_queries` visual tokens (Perceiver:
    Jaegle et al. 2021; BLIP-2: Li et al. 2023). An MLP with a residual, four times as wide, then a two-layer head that
    takes the tokens from the eyes' width to the voice's."""

    def __init__(self, vision_width: int, text_width: int, config: ProjectorConfig) -> None:
        super().__init__()
        if vision_width % config.num_heads:
            raise NanoVLMError(
                f"patch vectors of {vision_width} numbers are not made of the resampler's {config.num_heads} "
                "heads; take another projector, or another num_heads"
            )
        self.activation = ACTIVATIONS[config.activation]
        # As large as patch vectors are: small ones would begin with the same mean of all patches, 32 times.
        self.queries = nn.Parameter(torch.randn(config.num_queries, vision_width))
        self.attention = CrossAttention(
            vision_width, config.num_heads, qkv_bias=True, output_bias=True
        )
        self.mlp_norm = nn.LayerNorm(vision_width)
        self.mlp_up = nn.Linear(vision_width, 4 * vision_width)
        self.mlp_down = nn.Linear(4 * vision_width, vision_width)
        self.head_norm = nn.LayerNorm(vision_width)
        self.head_up = nn.Linear(vision_width, text_width)
        self.head_down = nn.Linear(text_width, text_width)

    def num_tokens(self, num_patches: int) -> int:
        return len(self.queries)

    def forward(self, patches: Tensor) -> Tensor:
        """(N, P, C_vision) → (N, num_queries, C_text)."""
        tokens = self.attention(self.queries[None], patches, patches)  # (N, num_queries, C_vision)
        tokens = tokens + self.mlp_down(self.activation(self.mlp_up(self.mlp_norm(tokens))))
        return self.head_down(self.activation(self.head_up(self.head_norm(tokens))))


PROJECTORS: dict[str, type[nn.Module]] = {
    "linear": LinearProjector,
    "mlp": MLPProjector,
    "pixel_shuffle": PixelShuffleProjector,
    "bilinear": BilinearProjector,
    "resampler": ResamplerProjector,
}


def build_projector(config: ProjectorConfig, vision_width: int, text_width: int) -> nn.Module:
    """The projector that `config.kind` names."""
    if config.kind not in PROJECTORS:
        raise NanoVLMError(
            f"projector {config.kind!r} is not known; take one of {', '.join(PROJECTORS)}"
        )
    return PROJECTORS[config.kind](vision_width, text_width, config)


def pixel_shuffle(patches: Tensor, scale: int) -> Tensor:
    """(N, P, C) on a square grid → (N, P / scale², C · scale²): space moved into channels, row by row."""
    batch, count, width = patches.shape
    side = square_side(count)
    squares = patches.reshape(batch, side // scale, scale, side // scale, scale, width).transpose(
        2, 3
    )
    return squares.reshape(batch, count // scale**2, width * scale**2)


def square_side(num_patches: int) -> int:
    """The side of a square grid of patches; anything else is an error."""
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise NanoVLMError(f"{num_patches} patches are not a square grid; use a square image size")
    return side
