"""One interface to the two libraries that are compared, and nanovlm's implementation of it."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nanovlm.generate import Prompt, compile_decoding, decode
from nanovlm.hub.models import join_parts
from nanovlm.inputs.batch import Batch
from nanovlm.inputs.chat import IGNORED
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.model.projector import MLPProjector, ProjectorConfig
from nanovlm.training.blocks import compile_blocks

VISION_ENCODER, LANGUAGE_MODEL = "dinov2-small", "qwen2.5-0.5b"  # two folders in the hub's format
IMAGE_SIZE = 224  # 16 × 16 patches of 14 pixels: 256 visual tokens


@dataclass(frozen=True)
class Inputs:
    """A batch in a form that suits both libraries; each row is one image followed by text."""

    pixels: Tensor  # (B, 3, 224, 224)
    input_ids: Tensor  # (B, 256 + T), placeholders first
    labels: Tensor  # (B, 256 + T), -100 where there is no label


def new_projector(vision_width: int, text_width: int) -> MLPProjector:
    """LLaVA's two layers with a GELU between them; both libraries get the same weights."""
    torch.manual_seed(0)
    return MLPProjector(vision_width, text_width, ProjectorConfig("mlp"))


class BenchModel(Protocol):
    """A model of one library. `prepare` does what a data loader would do and is not timed."""

    name: str
    vision_encoder: nn.Module
    projector: nn.Module
    language_model: nn.Module

    def compile(self) -> None:
        """Compile the blocks of vision encoder and language model with torch.compile."""

    def prepare(self, inputs: Inputs) -> Any:
        """The inputs in the library's own format."""

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) → all tokens after the final norm, (B, 1 + P, C_v)."""
        ...

    def loss(self, prepared: Any) -> Tensor:
        """The mean cross entropy over the labelled tokens."""
        ...

    def generate(self, prepared: Any, new_tokens: int, on_token: Callable[[], None]) -> list[int]:
        """Decode exactly `new_tokens` tokens greedily, for a batch of one.

        `on_token` is called after each token.
        """
        ...


class NanoVLMModel:
    """nanovlm's own model, all parameters in one dtype."""

    name = "nanovlm"

    def __init__(
        self, weights: Path, device: torch.device, dtype: torch.dtype, image_token_id: int
    ) -> None:
        self.model = join_parts(
            weights / VISION_ENCODER,
            weights / LANGUAGE_MODEL,
            ProjectorConfig("mlp"),
            ImageConfig(IMAGE_SIZE, IMAGE_SIZE),
        )
        config = self.model.config
        self.model.projector = new_projector(
            config.vision_encoder.hidden_size, config.language_model.hidden_size
        )
        self.model.to(device, dtype).eval()
        self.vision_encoder: nn.Module = self.model.vision_encoder
        self.projector: nn.Module = self.model.projector
        self.language_model: nn.Module = self.model.language_model
        # LLaVA uses the last block's output before the final norm.
        self.model.config = dataclasses.replace(config, vision_norm=False)
        self.image_token_id = image_token_id

    def compile(self) -> None:
        """The blocks as in a run; on CUDA, where it is worth it, decoding too."""
        device = self.model.vision_encoder.position_embedding.device
        compile_blocks(self.model, device)
        if device.type == "cuda":
            compile_decoding(self.model.language_model)

    def prepare(self, inputs: Inputs) -> Batch:
        targets = inputs.labels.flatten()
        positions = (targets != IGNORED).nonzero()[:, 0]
        return Batch(
            inputs.input_ids,
            torch.ones_like(inputs.input_ids),
            (inputs.input_ids == self.image_token_id).flatten().nonzero()[:, 0],
            positions - 1,
            targets[positions],
            inputs.pixels,
        )

    def encode(self, pixels: Tensor) -> Tensor:
        return self.vision_encoder(pixels)

    def loss(self, prepared: Batch) -> Tensor:
        return self.model(prepared) / len(prepared.targets)

    def generate(self, prepared: Batch, new_tokens: int, on_token: Callable[[], None]) -> list[int]:
        tokens = []
        with torch.inference_mode():
            embeddings = self.model.embed(prepared)
            prompt = Prompt(embeddings, prepared.input_ids, prepared.attention_mask)
            # No token has the id -1, so that the length is fixed.
            for (token,) in decode(self.model.language_model, prompt, new_tokens, stop_ids={-1}):
                tokens.append(token)
                on_token()
        return tokens
