"""Projectors: patch vectors of the vision encoder → visual tokens of the language model.

Each is a small class. To add one, write a subclass of `Projector` and add a line to PROJECTORS.

Lesson: lessons/source/08_projectors.py.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanovlm.errors import NanoVLMError
from nanovlm.model.attention import AttentionConfig
from nanovlm.model.layers import ACTIVATIONS, resize_grid
from nanovlm.model.resampler import CrossAttention
from nanovlm.utils.config import check_choices, check_numbers


@dataclass(frozen=True)
class ProjectorConfig:
    """Which projector, and its settings. Each setting is for the projectors named beside it."""

    kind: str = "mlp"  # a name of PROJECTORS
    grid: int = 8  # bilinear: side of the downsampled grid of patches
    scale: int = 2  # pixel_shuffle: side of the square of patches merged into one token
    activation: str = "gelu"  # mlp, bilinear, resampler: a name of ACTIVATIONS
    bias: bool = True  # linear, mlp, pixel_shuffle, bilinear: whether their matrices have one
    num_queries: int = 32  # resampler: visual tokens of an image
    num_heads: int = 8  # resampler

    def __post_init__(self) -> None:
        check_numbers(self)
        check_choices(self, {"activation": ACTIVATIONS})


class Projector(nn.Module):
    """(N, P, C_vision) patch vectors → (N, K, C_text) visual tokens."""

    def __init__(self, vision_width: int, text_width: int, config: ProjectorConfig) -> None:
        super().__init__()

    def num_tokens(self, num_patches: int) -> int:
        """K, the visual tokens that `num_patches` become; an error where they cannot be taken."""
        return num_patches

    @property
    def last_layer(self) -> nn.Linear:
        """The layer that gives the visual tokens: scaled, it scales them."""
        return [module for module in self.modules() if isinstance(module, nn.Linear)][-1]


class LinearProjector(Projector):
    """One matrix, one token a patch (LLaVA: Liu et al. 2023)."""

    def __init__(self, vision_width: int, text_width: int, config: ProjectorConfig) -> None:
        super().__init__(vision_width, text_width, config)
        self.linear = nn.Linear(vision_width, text_width, bias=config.bias)

    def forward(self, patches: Tensor) -> Tensor:
        """(N, P, C_vision) → (N, P, C_text)."""
        return self.linear(patches)


class MLPProjector(Projector):
    """Two matrices with an activation between, one token a patch (LLaVA-1.5: Liu et al. 2024)."""

    def __init__(self, vision_width: int, text_width: int, config: ProjectorConfig) -> None:
        super().__init__(vision_width, text_width, config)
        self.activation = ACTIVATIONS[config.activation]
        self.up = nn.Linear(vision_width, text_width, bias=config.bias)
        self.down = nn.Linear(text_width, text_width, bias=config.bias)

    def forward(self, patches: Tensor) -> Tensor:
        """(N, P, C_vision) → (N, P, C_text)."""
        return self.down(self.activation(self.up(patches)))


class PixelShuffleProjector(Projector):
    """Each square of scale × scale patches becomes one long vector; then one matrix.

    Pixel shuffle is by Shi et al. 2016; Idefics3 joins its parts so.
    """

    def __init__(self, vision_width: int, text_width: int, config: ProjectorConfig) -> None:
        super().__init__(vision_width, text_width, config)
        self.scale = config.scale
        self.linear = nn.Linear(vision_width * config.scale**2, text_width, bias=config.bias)

    def num_tokens(self, num_patches: int) -> int:
        side = square_side(num_patches)
        if side % self.scale:
            raise NanoVLMError(
                f"a grid of {side}×{side} patches is not made of {self.scale}×{self.scale} "
                "squares; change the image size or the projector's scale"
            )
        return num_patches // self.scale**2

    def forward(self, patches: Tensor) -> Tensor:
        """(N, P, C_vision) → (N, P / scale², C_text), row by row."""
        return self.linear(pixel_shuffle(patches, self.scale))


class BilinearProjector(MLPProjector):
    """The patches are averaged down to grid × grid, then the MLP: fewer tokens at no parameters."""

    def __init__(self, vision_width: int, text_width: int, config: ProjectorConfig) -> None:
        super().__init__(vision_width, text_width, config)
        self.grid = config.grid

    def num_tokens(self, num_patches: int) -> int:
        if square_side(num_patches) < self.grid:
            raise NanoVLMError(
                f"{num_patches} patches cannot be averaged down to {self.grid}×{self.grid}; "
                "use a smaller one (--grid)"
            )
        return self.grid**2

    def forward(self, patches: Tensor) -> Tensor:
        """(N, P, C_vision) → (N, grid², C_text).

        The antialiased filter weighs every patch, also at uneven ratios.
        """
        side = square_side(patches.shape[1])
        grid = patches.unflatten(1, (side, side))  # (N, side, side, C_vision)
        grid = resize_grid(grid, self.grid, self.grid, "bilinear_antialias")
        return super().forward(grid.to(patches.dtype))


class ResamplerProjector(Projector):
    """Learned queries attend to all patches and become `num_queries` visual tokens.

    Perceiver: Jaegle et al. 2021; BLIP-2: Li et al. 2023. A residual MLP of four times the width
    follows, then a two-layer head to the language model's width.
    """

    def __init__(self, vision_width: int, text_width: int, config: ProjectorConfig) -> None:
        super().__init__(vision_width, text_width, config)
        if vision_width % config.num_heads:
            raise NanoVLMError(
                f"patch vectors of {vision_width} numbers cannot be split into the resampler's "
                f"{config.num_heads} heads; take another projector, or another num_heads"
            )
        self.activation = ACTIVATIONS[config.activation]
        # As large as patch vectors: with small queries, all tokens would start as their mean.
        self.queries = nn.Parameter(torch.randn(config.num_queries, vision_width))
        heads = AttentionConfig.multi_head(vision_width, config.num_heads)
        self.attention = CrossAttention(heads)
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


PROJECTORS: dict[str, type[Projector]] = {
    "linear": LinearProjector,
    "mlp": MLPProjector,
    "pixel_shuffle": PixelShuffleProjector,
    "bilinear": BilinearProjector,
    "resampler": ResamplerProjector,
}


def build_projector(config: ProjectorConfig, vision_width: int, text_width: int) -> Projector:
    """The projector that `config.kind` names."""
    if config.kind not in PROJECTORS:
        raise NanoVLMError(
            f"projector {config.kind!r} is not known; take one of {', '.join(PROJECTORS)}"
        )
    return PROJECTORS[config.kind](vision_width, text_width, config)


def pixel_shuffle(patches: Tensor, scale: int) -> Tensor:
    """(N, P, C) on a square grid → (N, P / scale², C · scale²), row by row."""
    batch, count, width = patches.shape
    side = square_side(count)
    squares = patches.reshape(batch, side // scale, scale, side // scale, scale, width)
    squares = squares.transpose(2, 3)  # (N, side / scale, side / scale, scale, scale, C)
    return squares.reshape(batch, count // scale**2, width * scale**2)


def square_side(num_patches: int) -> int:
    """The side of a square grid of patches; anything else is an error."""
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise NanoVLMError(f"{num_patches} patches are not a square grid; use a square image size")
    return side
