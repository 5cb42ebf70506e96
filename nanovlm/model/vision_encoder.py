"""The vision transformer: pixels → one vector a patch. DINOv2, SigLIP and SigLIP 2, CLIP, SmolVLM2's and Qwen-VL's towers."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.errors import NanoVLMError
from nanovlm.model.attention import Attention
from nanovlm.model.layers import ACTIVATIONS, resize_positions
from nanovlm.model.resampler import Resampler
from nanovlm.utils.config import check_divides, check_numbers

RESIZES = ("bicubic", "nearest")


@dataclass(frozen=True)
class VisionEncoderConfig:
    """The shape of a vision transformer; the defaults are DINOv2's. `image_size` is the side, in pixels, its position table
    was made for; images may be larger or smaller."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    patch_size: int = 14
    image_size: int = 518
    num_register_tokens: int = 0
    swiglu: bool = False  # gated MLP, as in the giant
    position_antialias: bool = (
        False  # how a resized position table is filtered; the models with registers use it
    )
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu"  # one of ACTIVATIONS
    class_token: bool = True
    layer_scale: bool = True
    patch_bias: bool = True
    embedding_norm: bool = False  # before the first block
    final_norm: bool = True  # after the last one
    position_resize: str = "bicubic"  # or "nearest"
    num_queries: int = 0  # of a resampler after the blocks; 0 for none
    output_size: int = 0  # its width

    def __post_init__(self) -> None:
        check_numbers(self)
        check_divides(self, "hidden_size", "num_attention_heads")
        for name, known in (("hidden_act", ACTIVATIONS), ("position_resize", RESIZES)):
            if getattr(self, name) not in known:
                raise NanoVLMError(
                    f"VisionEncoderConfig: {name} is {getattr(self, name)!r}; implemented are {', '.join(known)}"
                )
        if math.isqrt(self.num_queries) ** 2 != self.num_queries:
            raise NanoVLMError(
                f"VisionEncoderConfig: num_queries is {self.num_queries}; it has to be a square number such as 256"
            )
        if bool(self.num_queries) != bool(self.output_size) or self.output_size % 4:
            raise NanoVLMError(
                f"VisionEncoderConfig: num_queries = {self.num_queries} with output_size = {self.output_size}; "
                "a resampler has both, and its width is a multiple of 4"
            )

    @property
    def num_prefix_tokens(self) -> int:
        """Those before the patches: CLS and registers."""
        return self.class_token + self.num_register_tokens

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches. What `image_size` has beyond whole patches is cut off, as the reference does."""
        if any(
            pixels % self.patch_size and pixels != self.image_size for pixels in (height, width)
        ):
            raise NanoVLMError(
                f"an image of {height}×{width} pixels is not made of {self.patch_size}-pixel patches; "
                f"resize it to multiples of {self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size

    def num_patches(self, height: int, width: int) -> int:
        """Of an image of so many pixels."""
        return math.prod(self.grid(height, width))

    def num_tokens(self, height: int, width: int) -> int:
        """What goes through the blocks for an image of so many pixels: CLS, registers and patches."""
        return self.num_prefix_tokens + self.num_patches(height, width)

    def num_features(self, height: int, width: int, layer: int = -1) -> int:
        """How many vectors `VisionEncoder.patches` gives for an image of so many pixels; an error where it gives none."""
        self.blocks_below(layer)
        patches = self.num_patches(height, width)
        return self.num_queries if self._resampled(layer) else patches

    def feature_size(self, layer: int = -1) -> int:
        """The width of the vectors that `VisionEncoder.patches` gives."""
        return self.output_size if self._resampled(layer) else self.hidden_size

    def blocks_below(self, layer: int) -> int:
        """How many blocks `VisionEncoder.patches` runs to give `layer`: all for -1 and one fewer for -2."""
        depth = self.num_hidden_layers
        if not -depth - 1 <= layer <= depth:
            raise NanoVLMError(
                f"layer {layer} of a vision transformer with {depth} blocks; "
                f"take one from {-depth - 1} to {depth}"
            )
        return layer % (depth + 1)

    def _resampled(self, layer: int) -> bool:
        return bool(self.num_queries) and layer == -1


class VisionMLP(nn.Module):
    """Linear, activation, linear; or SwiGLU (Shazeer 2020) when `swiglu`, its gate and value in one matrix as published."""

    def __init__(self, config: VisionEncoderConfig) -> None:
        super().__init__()
        self.swiglu, self.activation = config.swiglu, ACTIVATIONS[config.hidden_act]
        self.up_proj = nn.Linear(
            config.hidden_size, config.intermediate_size * (2 if config.swiglu else 1)
        )
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.up_proj(hidden_states)
        if self.swiglu:
            gate, value = hidden_states.chunk(2, dim=-1)
            return self.down_proj(F.silu(gate) * value)
        return self.down_proj(self.activation(hidden_states))


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP, with `layer_scale` each scaled per channel before it joins the residual
    (Touvron et al. 2021)."""

    def __init__(self, config: VisionEncoderConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(
            config.hidden_size, config.num_attention_heads, qkv_bias=True, output_bias=True
        )
        self.attention_scale = (
            nn.Parameter(torch.ones(config.hidden_size)) if config.layer_scale else None
        )
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)
        self.mlp_scale = (
            nn.Parameter(torch.ones(config.hidden_size)) if config.layer_scale else None
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + _scaled(
            self.attention(self.attention_norm(hidden_states)), self.attention_scale
        )
        return hidden_states + _scaled(self.mlp(self.mlp_norm(hidden_states)), self.mlp_scale)


def _scaled(hidden_states: Tensor, scale: Tensor | None) -> Tensor:
    return hidden_states if scale is None else scale * hidden_states


class VisionEncoder(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2020) as DINOv2 (Oquab et al. 2023; registers: Darcet et al. 2023), SigLIP
    (Zhai et al. 2023), CLIP (Radford et al. 2021) or Qwen-VL (Bai et al. 2023) has it."""

    def __init__(self, config: VisionEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.resize_mode = (
            "bicubic_antialias" if config.position_antialias else config.position_resize
        )
        width, eps, self.side = (
            config.hidden_size,
            config.layer_norm_eps,
            config.image_size // config.patch_size,
        )
        self.patch_embedding = nn.Conv2d(
            3, width, config.patch_size, stride=config.patch_size, bias=config.patch_bias
        )
        if config.class_token:
            self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        if config.num_register_tokens:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, width))
        self.position_embedding = nn.Parameter(
            torch.randn(1, config.class_token + self.side**2, width) * 0.02
        )  # CLS first
        self.embedding_norm = (
            nn.LayerNorm(width, eps=eps) if config.embedding_norm else nn.Identity()
        )
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, eps=eps) if config.final_norm else nn.Identity()
        if config.num_queries:
            self.resampler = Resampler(width, config.num_queries, config.output_size, eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) normalised pixels → (N, tokens, C) after the final norm, if there is one: CLS, registers, patches.
        With a resampler, the vectors it gives: (N, num_queries, output_size)."""
        tokens = self.norm(self._run_blocks(pixels, len(self.blocks)))
        return (
            self.resampler(tokens, *self.config.grid(*pixels.shape[-2:]))
            if self.config.num_queries
            else tokens
        )

    def patches(self, pixels: Tensor, layer: int = -1) -> Tensor:
        """The patch vectors alone, (N, P, C), row by row from the top left.

        `layer=-1` is after the final norm, and after the resampler where there is one. Any other index counts as the
        reference's `hidden_states` do (0 is before the first block, -2 before the last one) and is not normalised.
        """
        if layer == -1 and self.config.num_queries:
            return self(pixels)
        tokens = (
            self(pixels)
            if layer == -1
            else self._run_blocks(pixels, self.config.blocks_below(layer))
        )
        return tokens[:, self.config.num_prefix_tokens :]

    def _run_blocks(self, pixels: Tensor, count: int) -> Tensor:
        rows, columns = self.config.grid(*pixels.shape[-2:])
        cls_position, positions = (
            self.position_embedding[:, : -(self.side**2)],
            self.position_embedding[:, -(self.side**2) :],
        )
        positions = resize_positions(positions, self.side, rows, columns, self.resize_mode)
        tokens = [self.patch_embedding(pixels).flatten(2).transpose(1, 2) + positions]  # (N, P, C)
        if self.config.num_register_tokens:
            tokens.insert(0, self.register_tokens.expand(len(pixels), -1, -1))
        if self.config.class_token:
            tokens.insert(0, (self.cls_token + cls_position).expand(len(pixels), -1, -1))
        hidden_states = self.embedding_norm(torch.cat(tokens, dim=1))
        for block in self.blocks[:count]:
            hidden_states = block(hidden_states)
        return hidden_states
