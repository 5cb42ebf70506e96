"""The vision encoder: pixels → one vector a patch.

One transformer for DINOv2, SigLIP, SigLIP 2, CLIP, and the encoders of SmolVLM2 and Qwen-VL.

Lesson: lessons/source/03_vision_transformer.py.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.errors import NanoVLMError
from nanovlm.model.attention import Attention, AttentionConfig
from nanovlm.model.layers import ACTIVATIONS, LayerNorm, resize_positions
from nanovlm.model.resampler import Resampler
from nanovlm.utils.config import check_choices, check_divides, check_numbers

CHOICES = {"hidden_act": ACTIVATIONS, "position_resize": ("bicubic", "nearest")}


@dataclass(frozen=True)
class VisionEncoderConfig:
    """The shape of a vision transformer; the defaults are DINOv2's."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    patch_size: int = 14
    image_size: int = 518  # side in pixels that the position table is made for; images may differ
    num_register_tokens: int = 0
    swiglu: bool = False  # gated MLP, as in the giant DINOv2
    position_antialias: bool = False  # filter of a resized position table: DINOv2 with registers
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu"  # a name of ACTIVATIONS
    class_token: bool = True
    layer_scale: bool = True
    patch_bias: bool = True
    embedding_norm: bool = False  # before the first block
    final_norm: bool = True  # after the last block
    position_resize: str = "bicubic"  # or "nearest"
    num_queries: int = 0  # of a resampler after the blocks; 0 for none
    output_size: int = 0  # the resampler's width

    def __post_init__(self) -> None:
        check_numbers(self)
        check_divides(self, "hidden_size", "num_attention_heads")
        check_choices(self, CHOICES)
        if self.image_size < self.patch_size:
            raise NanoVLMError(
                f"VisionEncoderConfig: image_size = {self.image_size} holds no patch of "
                f"{self.patch_size} pixels (patch_size)"
            )
        if self.num_queries and self.num_prefix_tokens:
            raise NanoVLMError(
                "VisionEncoderConfig: a resampler (num_queries) reads patches alone; "
                "set class_token to false and num_register_tokens to 0"
            )
        if math.isqrt(self.num_queries) ** 2 != self.num_queries:
            raise NanoVLMError(
                f"VisionEncoderConfig: num_queries is {self.num_queries}; "
                "it has to be a square number such as 256"
            )
        if bool(self.num_queries) != bool(self.output_size) or self.output_size % 4:
            raise NanoVLMError(
                f"VisionEncoderConfig: num_queries = {self.num_queries} with output_size = "
                f"{self.output_size}; a resampler has both, and its width is a multiple of 4"
            )

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: class token and registers."""
        return self.class_token + self.num_register_tokens

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches.

        Of images of `image_size`, an incomplete last patch is cut off, as the reference does.
        """
        for pixels in (height, width):
            if pixels % self.patch_size and pixels != self.image_size:
                raise NanoVLMError(
                    f"an image of {height}×{width} pixels is not made of {self.patch_size}-pixel "
                    f"patches; resize it to multiples of {self.patch_size}"
                )
        return height // self.patch_size, width // self.patch_size

    def num_patches(self, height: int, width: int) -> int:
        """Patches of an image of height × width pixels."""
        return math.prod(self.grid(height, width))

    def num_tokens(self, height: int, width: int) -> int:
        """Tokens that pass the blocks for such an image: class token, registers and patches."""
        return self.num_prefix_tokens + self.num_patches(height, width)

    def feature_shape(
        self,
        height: int,
        width: int,
        layer: int = -1,
        norm: bool = True,
        first_token: int | None = None,
    ) -> tuple[int, int]:
        """(P, C) of what `VisionEncoder.patches` gives for an image of height × width pixels."""
        self.check_norm(layer, norm)
        if norm and self.num_queries > 0:
            return self.num_queries, self.output_size
        first_token = self.num_prefix_tokens if first_token is None else first_token
        count = self.num_tokens(height, width) - first_token
        if count < 1:
            raise NanoVLMError(
                f"token {first_token} is not one of an image of {height}×{width} pixels"
            )
        return count, self.hidden_size

    def check_norm(self, layer: int, norm: bool) -> None:
        """Refuse the final norm for any layer but the last, which alone it follows."""
        below = self.blocks_below(layer)
        if norm and below < self.num_hidden_layers:
            raise NanoVLMError(
                f"the final norm follows layer -1, not layer {layer}; "
                "set vision_norm = false (--no-vision-norm)"
            )

    def blocks_below(self, layer: int) -> int:
        """Blocks that `VisionEncoder.patches` runs for `layer`: all for -1, one fewer for -2."""
        depth = self.num_hidden_layers
        if not -depth - 1 <= layer <= depth:
            raise NanoVLMError(
                f"layer {layer} of a vision transformer with {depth} blocks; "
                f"take one from {-depth - 1} to {depth}"
            )
        return layer % (depth + 1)


class VisionMLP(nn.Module):
    """Linear, activation, linear; or SwiGLU (Shazeer 2020), with gate and value in one matrix."""

    def __init__(self, config: VisionEncoderConfig) -> None:
        super().__init__()
        self.swiglu, self.activation = config.swiglu, ACTIVATIONS[config.hidden_act]
        inner = config.intermediate_size * (2 if config.swiglu else 1)
        self.up_proj = nn.Linear(config.hidden_size, inner)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(…, C) → (…, C)."""
        hidden_states = self.up_proj(hidden_states)
        if self.swiglu:
            gate, value = hidden_states.chunk(2, dim=-1)
            return self.down_proj(F.silu(gate) * value)
        return self.down_proj(self.activation(hidden_states))


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP.

    With `layer_scale`, each residual branch is scaled per channel (Touvron et al. 2021).
    """

    def __init__(self, config: VisionEncoderConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.attention_norm = LayerNorm(width, eps=eps)
        self.attention = Attention(AttentionConfig.multi_head(width, config.num_attention_heads))
        self.attention_scale = nn.Parameter(torch.ones(width)) if config.layer_scale else None
        self.mlp_norm = LayerNorm(width, eps=eps)
        self.mlp = VisionMLP(config)
        self.mlp_scale = nn.Parameter(torch.ones(width)) if config.layer_scale else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(N, tokens, C) → (N, tokens, C)."""
        attended = self.attention(self.attention_norm(hidden_states))
        hidden_states = hidden_states + _scaled(attended, self.attention_scale)
        return hidden_states + _scaled(self.mlp(self.mlp_norm(hidden_states)), self.mlp_scale)


def _scaled(hidden_states: Tensor, scale: Tensor | None) -> Tensor:
    return hidden_states if scale is None else scale * hidden_states


class VisionEncoder(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2020), with the parts that its config names.

    DINOv2's (Oquab et al. 2023; registers: Darcet et al. 2023), SigLIP's (Zhai et al. 2023), CLIP's
    (Radford et al. 2021) or Qwen-VL's (Bai et al. 2023).
    """

    def __init__(self, config: VisionEncoderConfig) -> None:
        super().__init__()
        self.config = config
        width, eps = config.hidden_size, config.layer_norm_eps
        self.side = side = config.image_size // config.patch_size  # of the position table's grid
        size = config.patch_size
        self.patch_embedding = nn.Conv2d(3, width, size, stride=size, bias=config.patch_bias)
        if config.class_token:
            self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        if config.num_register_tokens:
            registers = torch.zeros(1, config.num_register_tokens, width)
            self.register_tokens = nn.Parameter(registers)
        table = torch.randn(1, config.class_token + side**2, width) * 0.02  # class token first
        self.position_embedding = nn.Parameter(table)
        self.embedding_norm = LayerNorm(width, eps=eps) if config.embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = LayerNorm(width, eps=eps) if config.final_norm else nn.Identity()
        if config.num_queries:
            self.resampler = Resampler(width, config.num_queries, config.output_size, eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) normalised pixels → (N, tokens, C) after the final norm.

        The tokens are the class token, the registers and the patches, in this order. With a
        resampler, the vectors that it gives: (N, num_queries, output_size).
        """
        tokens = self.norm(self._hidden_states(pixels, len(self.blocks)))
        if not self.config.num_queries:
            return tokens
        return self.resampler(tokens, *self.config.grid(*pixels.shape[-2:]))

    def patches(
        self, pixels: Tensor, layer: int = -1, norm: bool = True, first_token: int | None = None
    ) -> Tensor:
        """(N, 3, H, W) → the patch vectors alone, (N, P, C), row by row from the top left.

        `layer` counts as the reference's `hidden_states` and LLaVA's `vision_feature_layer` do: 0
        is before the first block, -1 after the last one, -2 before it. With `norm`, which layer -1
        alone may have, the final norm follows, and then the resampler where there is one.
        `first_token` is the first of the tokens (`forward`) that is given: 0 adds class token and
        registers, as LLaVA's `vision_feature_select_strategy = "full"` does.
        """
        self.config.check_norm(layer, norm)
        if norm and self.config.num_queries:
            return self(pixels)
        blocks = self.config.blocks_below(layer)
        tokens = self(pixels) if norm else self._hidden_states(pixels, blocks)
        return tokens[:, self.config.num_prefix_tokens if first_token is None else first_token :]

    def _hidden_states(self, pixels: Tensor, count: int) -> Tensor:
        """(N, 3, H, W) → (N, tokens, C) after the first `count` blocks."""
        hidden_states = self.embedding_norm(self._embed(pixels))
        for block in self.blocks[:count]:
            hidden_states = block(hidden_states)
        return hidden_states

    def _embed(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, tokens, C): class token, registers, and patches with positions."""
        rows, columns = self.config.grid(*pixels.shape[-2:])
        antialias = self.config.position_antialias
        mode = "bicubic_antialias" if antialias else self.config.position_resize
        cls_position, positions = self.position_embedding.tensor_split([-(self.side**2)], dim=1)
        positions = resize_positions(positions, self.side, rows, columns, mode)
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2) + positions  # (N, P, C)
        tokens = [patches]
        if self.config.num_register_tokens:
            tokens.insert(0, self.register_tokens.expand(len(pixels), -1, -1))
        if self.config.class_token:
            tokens.insert(0, (self.cls_token + cls_position).expand(len(pixels), -1, -1))
        return torch.cat(tokens, dim=1)
