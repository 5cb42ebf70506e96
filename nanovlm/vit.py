"""The vision transformer: pixels → one vector a patch. DINOv2 small, base, large and giant, with and without registers."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.attention import Attention
from nanovlm.config import check_divides, check_numbers, from_dict, read_hf_config, require
from nanovlm.errors import NanoVLMError
from nanovlm.weights.pretrained import load_pretrained
from nanovlm.weights.names import DINOV2


@dataclass(frozen=True)
class VisionConfig:
    """The shape of a vision transformer. `image_size` is the side, in pixels, its position table was made for."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    patch_size: int = 14
    image_size: int = 518
    num_register_tokens: int = 0
    swiglu: bool = False  # gated MLP, as in the giant
    position_antialias: bool = False  # how a resized position table is filtered; the models with registers use it
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_numbers(self)
        check_divides(self, "hidden_size", "num_attention_heads")

    @classmethod
    def from_hf(cls, config: dict) -> "VisionConfig":
        """Read the `config.json` of a DINOv2 folder; hub files leave out what equals the reference's defaults."""
        registers = config.get("model_type") == "dinov2_with_registers"
        config = read_hf_config(config, ("dinov2", "dinov2_with_registers"), defaults=dict(
            hidden_size=768, num_hidden_layers=12, num_attention_heads=12, mlp_ratio=4, hidden_act="gelu",
            layer_norm_eps=1e-6, image_size=224, patch_size=16 if registers else 14, num_channels=3, qkv_bias=True,
            use_swiglu_ffn=False, num_register_tokens=4 if registers else 0,
        ), ignored=("layerscale_value", "drop_path_rate", "hidden_dropout_prob", "attention_probs_dropout_prob",
                    "apply_layernorm", "reshape_hidden_states", "use_mask_token", "out_features", "out_indices",
                    "stage_names"))
        require(config, hidden_act="gelu", num_channels=3, qkv_bias=True)
        width = config["hidden_size"]
        intermediate_size = int(width * config["mlp_ratio"])
        if config["use_swiglu_ffn"]:  # two thirds, so that three matrices weigh what two did; rounded up to 8
            intermediate_size = (int(intermediate_size * 2 / 3) + 7) // 8 * 8
        return from_dict(cls, dict(
            hidden_size=width, intermediate_size=intermediate_size, num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=config["num_attention_heads"], patch_size=config["patch_size"],
            image_size=config["image_size"], num_register_tokens=config["num_register_tokens"],
            swiglu=config["use_swiglu_ffn"], position_antialias=registers,
            layer_norm_eps=config["layer_norm_eps"]), where="config.json")

    @classmethod
    def from_dict(cls, config: dict) -> "VisionConfig":
        return from_dict(cls, config)

    def num_patches(self, height: int, width: int) -> int:
        """Of an image of so many pixels."""
        return (height // self.patch_size) * (width // self.patch_size)

    def feature_size(self, layer: int = -1) -> int:
        """The width of the vectors that `VisionTransformer.patches` gives."""
        return self.hidden_size

    def blocks_below(self, layer: int) -> int:
        """How many blocks `VisionTransformer.patches` runs to give `layer`: all for -1 and one fewer for -2."""
        return layer % (self.num_hidden_layers + 1)


class VisionMLP(nn.Module):
    """Linear, GELU, linear; or SwiGLU (Shazeer 2020) when `swiglu`, its gate and value in one matrix as published."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.swiglu = config.swiglu
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size * (2 if config.swiglu else 1))
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.up_proj(hidden_states)
        if self.swiglu:
            gate, value = hidden_states.chunk(2, dim=-1)
            return self.down_proj(F.silu(gate) * value)
        return self.down_proj(F.gelu(hidden_states))


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP, each scaled per channel before it joins the residual (Touvron et al. 2021)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config.hidden_size, config.num_attention_heads, qkv_bias=True, output_bias=True)
        self.attention_scale = nn.Parameter(torch.ones(config.hidden_size))
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)
        self.mlp_scale = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.attention_scale * self.attention(self.attention_norm(hidden_states))
        return hidden_states + self.mlp_scale * self.mlp(self.mlp_norm(hidden_states))


class VisionTransformer(nn.Module):
    """DINOv2 (Oquab et al. 2023; registers: Darcet et al. 2023)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        width, grid = config.hidden_size, config.image_size // config.patch_size
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=config.patch_size, stride=config.patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        if config.num_register_tokens:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, width))
        self.position_embedding = nn.Parameter(torch.randn(1, 1 + grid * grid, width) * 0.02)  # CLS first
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None) -> "VisionTransformer":
        """Load a hub folder (`config.json`, `model.safetensors`); any missing, unexpected or mis-shaped tensor is an error."""
        return load_pretrained(cls, VisionConfig, folder, DINOV2, dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) normalised pixels → (N, 1 + registers + patches, C) after the final norm: CLS, registers, patches."""
        return self.norm(self._run_blocks(pixels, len(self.blocks)))

    def patches(self, pixels: Tensor, layer: int = -1) -> Tensor:
        """The patch vectors alone, (N, P, C), row by row from the top left.

        `layer=-1` is after the final norm. Any other index counts as the reference's `hidden_states` do (0 is before
        the first block, -2 before the last one) and is not normalised.
        """
        depth = len(self.blocks)
        if not -depth - 1 <= layer <= depth:
            raise NanoVLMError(f"layer {layer} of a vision transformer with {depth} blocks; take one from {-depth - 1} to {depth}")
        tokens = self(pixels) if layer == -1 else self._run_blocks(pixels, self.config.blocks_below(layer))
        return tokens[:, 1 + self.config.num_register_tokens:]

    def _run_blocks(self, pixels: Tensor, count: int) -> Tensor:
        patch_size = self.config.patch_size
        batch, _, height, width = pixels.shape
        if height % patch_size or width % patch_size:
            raise NanoVLMError(f"an image of {height}×{width} pixels is not made of {patch_size}-pixel patches; "
                               f"resize it to multiples of {patch_size}")
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (N, P, C)
        positions = self._positions(height // patch_size, width // patch_size)
        tokens = [(self.cls_token + positions[:, :1]).expand(batch, -1, -1), patches + positions[:, 1:]]
        if self.config.num_register_tokens:
            tokens.insert(1, self.register_tokens.expand(batch, -1, -1))
        hidden_states = torch.cat(tokens, dim=1)
        for block in self.blocks[:count]:
            hidden_states = block(hidden_states)
        return hidden_states

    def _positions(self, rows: int, columns: int) -> Tensor:
        """The position table for a grid of rows × columns patches: (1, 1 + rows·columns, C)."""
        side = math.isqrt(self.position_embedding.shape[1] - 1)
        if (rows, columns) == (side, side):
            return self.position_embedding
        cls_position, grid = self.position_embedding[:, :1], self.position_embedding[:, 1:]
        grid = grid.unflatten(1, (side, side)).permute(0, 3, 1, 2).float()  # bicubic in half precision shifts the table
        grid = F.interpolate(grid, (rows, columns), mode="bicubic", antialias=self.config.position_antialias)
        return torch.cat((cls_position, grid.flatten(2).transpose(1, 2).to(cls_position.dtype)), dim=1)
