"""Projectors: patch vectors of the eyes → visual tokens of the voice, one small class each.

To add one, write a class with this constructor and `num_tokens`, and add a line to PROJECTORS.
"""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.config import check_numbers, from_dict
from nanovlm.errors import NanoVLMError


@dataclass(frozen=True)
class ProjectorConfig:
    """`kind` is a name of PROJECTORS. `grid` is the side of the downsampled patch grid (bilinear), `scale` the
    side of the square of patches merged into one token (pixel_shuffle)."""

    kind: str = "mlp"
    grid: int = 8
    scale: int = 2

    def __post_init__(self) -> None:
        check_numbers(self)

    @classmethod
    def from_dict(cls, config: dict) -> "ProjectorConfig":
        return from_dict(cls, config)


class LinearProjector(nn.Module):
    """One matrix, one token a patch (LLaVA: Liu et al. 2023)."""

    def __init__(self, vision_width: int, text_width: int, config: ProjectorConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(vision_width, text_width)

    def num_tokens(self, num_patches: int) -> int:
        return num_patches

    def forward(self, patches: Tensor) -> Tensor:
        """(N, P, C_vision) → (N, P, C_text)."""
        return self.linear(patches)


class MLPProjector(nn.Module):
    """Two layers with a GELU between, one token a patch (LLaVA-1.5: Liu et al. 2024)."""

    def __init__(self, vision_width: int, text_width: int, config: ProjectorConfig) -> None:
        super().__init__()
        self.up = nn.Linear(vision_width, text_width)
        self.down = nn.Linear(text_width, text_width)

    def num_tokens(self, num_patches: int) -> int:
        return num_patches

    def forward(self, patches: Tensor) -> Tensor:
        """(N, P, C_vision) → (N, P, C_text)."""
        return self.down(F.gelu(self.up(patches)))


class PixelShuffleProjector(nn.Module):
    """Each square of scale × scale patches becomes one long vector, then one matrix (Shi et al. 2016; Idefics3)."""

    def __init__(self, vision_width: int, text_width: int, config: ProjectorConfig) -> None:
        super().__init__()
        self.scale = config.scale
        self.linear = nn.Linear(vision_width * config.scale ** 2, text_width)

    def num_tokens(self, num_patches: int) -> int:
        side = square_side(num_patches)
        if side % self.scale:
            raise NanoVLMError(f"a grid of {side}×{side} patches is not made of {self.scale}×{self.scale} squares; "
                               "change the image size or the projector's scale")
        return num_patches // self.scale ** 2

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
            raise NanoVLMError(f"{num_patches} patches cannot be averaged down to {self.grid}×{self.grid}; use a smaller grid")
        return self.grid ** 2

    def forward(self, patches: Tensor) -> Tensor:
        """(N, P, C_vision) → (N, grid², C_text). The antialiased filter weighs every patch, also at uneven ratios."""
        side = square_side(patches.shape[1])
        grid = patches.transpose(1, 2).unflatten(2, (side, side)).float()
        grid = F.interpolate(grid, (self.grid, self.grid), mode="bilinear", antialias=True)
        return super().forward(grid.flatten(2).transpose(1, 2).to(patches.dtype))


PROJECTORS: dict[str, type[nn.Module]] = {
    "linear": LinearProjector,
    "mlp": MLPProjector,
    "pixel_shuffle": PixelShuffleProjector,
    "bilinear": BilinearProjector,
}


def build_projector(config: ProjectorConfig, vision_width: int, text_width: int) -> nn.Module:
    """The projector that `config.kind` names."""
    if config.kind not in PROJECTORS:
        raise NanoVLMError(f"projector {config.kind!r} is not known; take one of {', '.join(PROJECTORS)}")
    return PROJECTORS[config.kind](vision_width, text_width, config)


def pixel_shuffle(patches: Tensor, scale: int) -> Tensor:
    """(N, P, C) on a square grid → (N, P / scale², C · scale²): space moved into channels, row by row."""
    batch, count, width = patches.shape
    side = square_side(count)
    squares = patches.reshape(batch, side // scale, scale, side // scale, scale, width).transpose(2, 3)
    return squares.reshape(batch, count // scale ** 2, width * scale ** 2)


def square_side(num_patches: int) -> int:
    """The side of a square grid of patches; anything else is an error."""
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise NanoVLMError(f"{num_patches} patches are not a square grid; use a square image size")
    return side
