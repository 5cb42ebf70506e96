"""A LLaVA model of transformers made from the same weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from nanovlm.bench.models import LANGUAGE_MODEL, VISION_ENCODER, Inputs, new_projector


class TransformersModel:
    """`LlavaForConditionalGeneration` as published, with its default attention and cache."""

    name = "transformers"

    def __init__(
        self, weights: Path, device: torch.device, dtype: torch.dtype, image_token_id: int
    ) -> None:
        logging.disable_progress_bar()
        vision_encoder = AutoModel.from_pretrained(weights / VISION_ENCODER, dtype=dtype)
        language_model = AutoModel.from_pretrained(weights / LANGUAGE_MODEL, dtype=dtype)
        config: dict[str, Any] = {
            "vision_config": vision_encoder.config,
            "text_config": language_model.config,
            "image_token_id": image_token_id,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
            "tie_word_embeddings": True,
        }
        with torch.device("meta"):  # allocates nothing: all parts are replaced below
            self.model: Any = LlavaForConditionalGeneration(LlavaConfig(**config))
        self.model.model.vision_tower = vision_encoder
        self.model.model.language_model = language_model
        self.model.lm_head.weight = language_model.embed_tokens.weight
        projector = self.model.model.multi_modal_projector
        source = new_projector(vision_encoder.config.hidden_size, language_model.config.hidden_size)
        for target, layer in ((projector.linear_1, source.up), (projector.linear_2, source.down)):
            target.weight = nn.Parameter(layer.weight.detach())
            target.bias = nn.Parameter(layer.bias.detach())
        self.model.to(device, dtype).eval()
        # Without a token that ends the answer, so that its length is fixed.
        self.model.generation_config = GenerationConfig(do_sample=False)
        self.vision_encoder: nn.Module = vision_encoder
        self.projector: nn.Module = projector
        self.language_model: nn.Module = language_model

    def compile(self) -> None:
        for part in (self.vision_encoder, self.language_model):
            for module in part.modules():
                if isinstance(module, nn.ModuleList):
                    for block in module:
                        block.compile()

    def prepare(self, inputs: Inputs) -> dict[str, Any]:
        return {
            "input_ids": inputs.input_ids,
            "attention_mask": torch.ones_like(inputs.input_ids),
            "pixel_values": inputs.pixels,
            "labels": inputs.labels,
        }

    def encode(self, pixels: Tensor) -> Tensor:
        return self.vision_encoder(pixels).last_hidden_state

    def loss(self, prepared: dict[str, Any]) -> Tensor:
        return self.model(**prepared, use_cache=False).loss

    def generate(
        self, prepared: dict[str, Any], new_tokens: int, on_token: Callable[[], None]
    ) -> list[int]:
        inputs = {name: tensor for name, tensor in prepared.items() if name != "labels"}
        written = self.model.generate(
            **inputs, max_new_tokens=new_tokens, streamer=_Streamer(on_token)
        )
        return written[0, inputs["input_ids"].shape[1] :].tolist()


class _Streamer(BaseStreamer):
    """Calls `on_token` for each new token; the first thing a streamer is given is the prompt."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        self._on_token, self._prompt_seen = on_token, False

    def put(self, value: Tensor) -> None:
        if self._prompt_seen:
            self._on_token()
        self._prompt_seen = True

    def end(self) -> None:
        pass
