"""One interface over the two libraries that are measured, and nanovlm's side of it."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nanovlm.generate import Prompt, decode
from nanovlm.hub.models import join_parts
from nanovlm.inputs.batch import Batch
from nanovlm.inputs.chat import IGNORED
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.model.projector import ProjectorConfig, build_projector
from nanovlm.training.blocks import compile_blocks

VISION, TEXT = "dinov2-small", "qwen2.5-0.5b"  # the two folders of hub files that are read
IMAGE_SIZE = 224  # 16 × 16 patches of 14 pixels: 256 visual tokens


@dataclass(frozen=True)
class Work:
    """A batch as both libraries can be given it; every row is one image, then text."""

    pixels: Tensor  # (B, 3, 224, 224)
    input_ids: Tensor  # (B, 256 + T), placeholders first
    labels: Tensor  # (B, 256 + T), -100 where nothing is learned


def new_projector(vision_width: int, text_width: int) -> nn.Module:
    """LLaVA's two layers with a GELU between; both sides start from the same ones."""
    torch.manual_seed(0)
    return build_projector(ProjectorConfig("mlp"), vision_width, text_width)


class Side(Protocol):
    """A model of one library. `prepare` is what a data loader would do and is not timed."""

    name: str
    vision: nn.Module
    projector: nn.Module
    decoder: nn.Module

    def compile(self) -> None:
        """The blocks of both towers, by torch.compile."""

    def prepare(self, work: Work) -> Any: ...

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) → all tokens after the final norm, (B, 1 + P, C_v)."""

    def loss(self, prepared: Any) -> Tensor:
        """The mean cross entropy over the labelled tokens."""

    def generate(self, prepared: Any, new_tokens: int, on_token: Callable[[], None]) -> list[int]:
        """Greedy and of fixed length, for a batch of one; `on_token` is called as each token comes."""


class NanoVLM:
    """nanovlm's own model, all parameters in one dtype."""

    name = "nanovlm"

    def __init__(
        self, weights: Path, device: torch.device, dtype: torch.dtype, image_token_id: int
    ) -> None:
        self.model = join_parts(
            weights / VISION,
            weights / TEXT,
            ProjectorConfig("mlp"),
            ImageConfig(IMAGE_SIZE, IMAGE_SIZE),
        )
        self.model.projector = new_projector(
            self.model.config.vision_encoder.hidden_size,
            self.model.config.language_model.hidden_size,
        )
        self.model.to(device, dtype).eval()
        self.vision_encoder, self.projector, self.language_model = (
            self.model.vision_encoder,
            self.model.projector,
            self.model.language_model,
        )
        # What LLaVA models look at: the last block's output, before the final norm.
        self.model.config = dataclasses.replace(
            self.model.config, vision_layer=len(self.vision_encoder.blocks)
        )
        self.image_token_id = image_token_id

    def compile(self) -> None:
        """As a run does: generation, which brings a cache, runs the blocks as they are."""
        compile_blocks(self.model, self.vision_encoder.cls_token.device)

    def prepare(self, work: Work) -> Batch:
        targets = work.labels.flatten()
        positions = (targets != IGNORED).nonzero()[:, 0]
        return Batch(
            work.input_ids,
            torch.ones_like(work.input_ids),
            (work.input_ids == self.image_token_id).flatten().nonzero()[:, 0],
            positions - 1,
            targets[positions],
            work.pixels,
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
            for (token,) in decode(self.language_model, prompt, new_tokens, stop_ids={-1}):
                tokens.append(token)
                on_token()
        return tokens
