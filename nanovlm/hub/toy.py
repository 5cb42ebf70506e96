"""Any architecture at toy widths, with random weights: to see it run in seconds."""

import dataclasses
from pathlib import Path

from nanovlm.inputs.templates import TEMPLATES
from nanovlm.model.language_model import LanguageModelConfig
from nanovlm.model.vision_encoder import VisionEncoderConfig
from nanovlm.model.vlm import VisionLanguageModel, VLMConfig
from nanovlm.tokenizer import load_tokenizer

ASSETS = Path(__file__).parents[1] / "assets"  # the weights and tokenizers that ship
TOY_LAYERS = 4  # blocks of each transformer
TOY_SIDE = 64  # pixels of an image, as the toy world draws them


def toy_model(config: VLMConfig) -> VisionLanguageModel:
    """The architecture of `config` at toy widths, with random weights and the toy tokenizer."""
    tokenizer = load_tokenizer(ASSETS / "tiny-language-model")
    for token in (*sorted(TEMPLATES[config.chat.template].special), config.chat.image_token):
        tokenizer.add_special_token(token)
    return VisionLanguageModel(toy_config(config, tokenizer.vocab_size), tokenizer).eval()


def toy_config(config: VLMConfig, vocab_size: int) -> VLMConfig:
    """`config` with every switch as it is and every number small, for images of TOY_SIDE pixels."""
    tiles = config.image.fit == "tiles"
    side = TOY_SIDE // 2 if tiles else TOY_SIDE
    projector = dataclasses.replace(
        config.projector, grid=4, scale=min(config.projector.scale, 4), num_queries=8, num_heads=4
    )
    image = dataclasses.replace(
        config.image, height=side, width=side, max_tiles=2 if tiles else None
    )
    return dataclasses.replace(
        config,
        vision_encoder=_toy_vision_encoder(config, side),
        language_model=_toy_language_model(config.language_model, vocab_size),
        projector=projector,
        image=image,
    )


def _toy_vision_encoder(config: VLMConfig, side: int) -> VisionEncoderConfig:
    """Of 8 × 8 patches for an image (or tile) of `side` pixels."""
    vision, patches = config.vision_encoder, 8
    # The position table stays as much smaller or larger than an image as it was.
    table = round(patches * vision.image_size / config.image.height)
    return dataclasses.replace(
        vision,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=TOY_LAYERS,
        num_attention_heads=4,
        patch_size=side // patches,
        image_size=table * (side // patches),
        num_queries=16 if vision.num_queries else 0,
        output_size=64 if vision.num_queries else 0,
    )


def _toy_language_model(language: LanguageModelConfig, vocab_size: int) -> LanguageModelConfig:
    heads = language.num_attention_heads
    grouped = language.num_key_value_heads != heads  # grouped-query attention
    # The heads together stay as much wider than the model as they were.
    ratio = round(language.head_dim * heads / language.hidden_size)
    return dataclasses.replace(
        language,
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=TOY_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2 if grouped else 4,
        head_dim=16 * ratio,
        max_position_embeddings=1024,
        embedding_size=128 if language.embedding_size else 0,
        reducer_size=32,
        original_max_position_embeddings=512 if language.original_max_position_embeddings else 0,
    )
