"""The other side: a transformers LLaVA model made of the same weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from nanovlm.bench.sides import TEXT, VISION, Work, new_projector


class Transformers:
    """`LlavaForConditionalGeneration` as published, with its default attention and cache."""

    name = "transformers"

    def __init__(
        self, weights: Path, device: torch.device, dtype: torch.dtype, image_token_id: int
    ) -> None:
        logging.disable_progress_bar()
        vision = AutoModel.from_pretrained(weights / VISION, dtype=dtype)
        decoder = AutoModel.from_pretrained(weights / TEXT, dtype=dtype)
        config = LlavaConfig(
            vision_config=vision.config,
            text_config=decoder.config,
            image_token_id=image_token_id,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=True,
        )
        with torch.device("meta"):  # laid out without memory: every part is put in below
            self.model = LlavaForConditionalGeneration(config)
        self.model.model.vision_tower, self.model.model.language_model = vision, decoder
        self.model.lm_head.weight = decoder.embed_tokens.weight
        layers = self.model.model.multi_modal_projector
        projector = new_projector(vision.config.hidden_size, decoder.config.hidden_size)
        for theirs, ours in ((layers.linear_1, projector.up), (layers.linear_2, projector.down)):
            theirs.weight = nn.Parameter(ours.weight.detach())
            theirs.bias = nn.Parameter(ours.bias.detach())
        self.model.to(device, dtype).eval()
        self.model.generation_config = GenerationConfig(
            do_sample=False
        )  # without an end, so that lengths are fixed
        self.vision_encoder, self.projector, self.language_model = vision, layers, decoder

    def compile(self) -> None:
        for tower in (self.vision_encoder, self.language_model):
            for blocks in (
                module for module in tower.modules() if isinstance(module, nn.ModuleList)
            ):
                for block in blocks:
                    block.compile()

    def prepare(self, work: Work) -> dict[str, Any]:
        return {
            "input_ids": work.input_ids,
            "attention_mask": torch.ones_like(work.input_ids),
            "pixel_values": work.pixels,
            "labels": work.labels,
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
            **inputs, max_new_tokens=new_tokens, streamer=_Announcer(on_token)
        )
        return written[0, inputs["input_ids"].shape[1] :].tolist()


class _Announcer(BaseStreamer):
    """Tells of each new token; the first thing a streamer is given is the prompt."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        self._on_token, self._prompt_seen = on_token, False

    def put(self, value: Tensor) -> None:
        if self._prompt_seen:
            self._on_token()
        self._prompt_seen = True

    def end(self) -> None:
        pass
