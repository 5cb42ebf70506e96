"""A tiny model around a language model from scratch: resampler, reducer, mixture of experts."""

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

LANGUAGE_CONFIG = LanguageModelConfig(
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
    folder: Path, bidirectional_images: bool = True, **settings: Any
) -> VisionLanguageModel:
    """16 patches and 4 visual tokens an image; `settings` are those of the language model.

    Its parts are saved to `folder`.
    """
    vision_folder, language_folder = folder / "vision_encoder", folder / "language_model"
    torch.manual_seed(0)
    dinov2(vision_folder)
    vocab_size = len(byte_pair(language_folder))
    config = dataclasses.replace(LANGUAGE_CONFIG, vocab_size=vocab_size, **settings)
    language_model = LanguageModel(config)
    randomise(language_model, seed=0)
    save_language_model(language_model, language_folder)
    return join_parts(
        vision_folder,
        language_folder,
        ProjectorConfig("resampler", num_queries=4, num_heads=4),
        ImageConfig(28, 28),
        bidirectional_images=bidirectional_images,
    ).eval()
