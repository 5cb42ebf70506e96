"""A whole tiny model around a decoder made from scratch: resampler, reducer, experts, images seen both ways."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from nanovlm.hub.models import join_parts, save_language_model
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.model.language_model import LanguageModel, LanguageModelConfig
from nanovlm.model.projector import ProjectorConfig
from nanovlm.model.vlm import VisionLanguageModel
from tests.reference.models import byte_pair, dinov2, randomise

TEXT = LanguageModelConfig(
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    norm="layer",
    rms_norm_eps=1e-5,
    positions="learned",
    mlp="gelu",
    output_bias=True,
    mlp_bias=True,
    embedding_size=40,
    reducer_size=12,
    num_experts=4,
    num_shared_experts=1,
    balance_loss=0.01,
)


def scratch_vlm(
    folder: Path, bidirectional_images: bool = True, **text: Any
) -> VisionLanguageModel:
    """16 patches, 4 visual tokens; `text` are settings of its decoder. The parts are saved to `folder`."""
    torch.manual_seed(0)
    dinov2(folder / "vision_encoder")
    decoder = LanguageModel(
        dataclasses.replace(TEXT, vocab_size=len(byte_pair(folder / "language_model")), **text)
    )
    randomise(decoder, seed=0)
    save_language_model(decoder, folder / "language_model")
    projector = ProjectorConfig("resampler", num_queries=4, num_heads=4)
    return join_parts(
        folder / "vision_encoder",
        folder / "language_model",
        projector,
        ImageConfig(28, 28),
        bidirectional_images=bidirectional_images,
    ).eval()
