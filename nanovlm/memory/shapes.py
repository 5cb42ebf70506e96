"""The shapes that memory depends on: of a step's batch, and of a model, from its configs alone."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from nanovlm.data.preferences import PairBatch
from nanovlm.data.words import Vocabulary, WordBatch
from nanovlm.errors import NanoVLMError
from nanovlm.hub.models import read_model_config
from nanovlm.hub.toy import toy_model
from nanovlm.inputs.batch import Batch
from nanovlm.inputs.templates import TEMPLATES
from nanovlm.model.vlm import VisionLanguageModel, VLMConfig
from nanovlm.training.building import planned_config, set_up
from nanovlm.training.monitor.walk import BatchShape
from nanovlm.training.precision import Precision
from nanovlm.training.settings import Settings

TEXT_TOKENS = 64  # of a sample, unless --tokens is given


def batch_shape(config: VLMConfig, settings: Settings, tokens: int | None = None) -> BatchShape:
    """The batch of `settings`: rows of `tokens` tokens, images included.

    Without `tokens`, samples of an image and TEXT_TOKENS of text, which share or pack rows as the
    settings say.

    Half of the text is labelled; of a pair of answers two thirds: both answers share a row with
    their image and prompt, and with no other pair. An image cut into tiles is a square one, which
    gives the most tiles.
    """
    image_length, pairs = skeleton(config).max_image_length, settings.objective == "dpo"
    text_tokens = TEXT_TOKENS // 2 * 3 if pairs else TEXT_TOKENS
    images_per_row = 1
    if settings.objective == "words":
        rows, tiles = settings.batch_size, config.image.max_tiles_per_image
        words = min(settings.max_words, config.language_model.vocab_size)
        cached = settings.cache_features
        return BatchShape(rows, image_length, rows * tiles, 0, cached_features=cached, words=words)
    if tokens:
        rows, length = settings.batch_size, tokens
    elif settings.pack:
        images_per_row = max(1, settings.pack // (image_length + text_tokens))
        rows, length = math.ceil(settings.batch_size / images_per_row), settings.pack
    else:
        share = 1 if pairs else min(settings.share, settings.batch_size)
        rows = math.ceil(settings.batch_size / share)
        length = image_length + share * text_tokens
    text = length - images_per_row * image_length  # of a row
    if text < (3 * images_per_row if pairs else 2):
        raise NanoVLMError(
            f"a row of {length} tokens has no room for an image of {image_length} tokens and text; "
            f"raise {'--tokens' if tokens else '--pack'}"
        )
    limit = config.language_model.max_position_embeddings
    if length > limit and config.language_model.positions == "learned":
        raise NanoVLMError(
            f"a row of {length} tokens is longer than the {limit} positions that the language "
            f"model has; lower {'--tokens' if tokens else '--pack or --share'}"
        )
    images = rows * images_per_row
    return BatchShape(
        rows,
        length,
        images * config.image.max_tiles_per_image,
        images * 2 * (text // images_per_row // 3) if pairs else rows * max(1, text // 2),
        images if pairs else 0,
        settings.cache_features,
    )


def random_batch(
    model: VisionLanguageModel, shape: BatchShape, dtype: torch.dtype = torch.float32
) -> Batch:
    """Random tokens and pixels of this shape on the CPU.

    In place of pixels there may be cached features, of `dtype`. In each row the images come first
    and the labels last.
    """
    config, (rows, length) = model.config, (shape.rows, shape.length)
    ids = torch.randint(config.language_model.vocab_size, (rows, length))
    positions = torch.arange(shape.tokens).view(rows, length)
    labelled, visual = shape.targets // rows, shape.images * model.image_length // rows
    tensors: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "image_positions": positions[:, :visual].flatten(),
        "target_positions": positions[:, -labelled - 1 : -1].flatten(),
        "targets": torch.randint(config.language_model.vocab_size, (shape.targets,)),
        "right_padded": not shape.pairs,
    }
    if shape.cached_features:
        tensors["patches"] = torch.randn(shape.images, *config.feature_shape, dtype=dtype)
    elif shape.images:
        image = config.image
        tensors["pixels"] = torch.randn(shape.images, 3, image.height, image.width)
    if shape.words:
        counts, lengths = torch.rand(rows, shape.words), (length,) * rows
        return WordBatch(**tensors, counts=counts, lengths=lengths)
    if not shape.pairs:
        return Batch(**tensors)
    lengths = torch.full((2 * shape.pairs,), shape.targets // shape.pairs // 2)
    return PairBatch(**tensors, lengths=lengths, reference=torch.zeros(shape.pairs, 2))


def any_words(model: VisionLanguageModel, settings: Settings) -> Vocabulary:
    """As many words as `settings` can have to learn: the data decide which they are."""
    count = min(settings.max_words, model.config.language_model.vocab_size)
    return Vocabulary(range(count), [0.5] * count)


def model_config(settings: Settings) -> VLMConfig:
    """The model that `settings` start from.

    --init, or --vision-encoder and --language-model: folders or names of published shapes.
    """
    parts = settings.vision_encoder or settings.language_model
    if settings.init and not parts and Path(settings.init, "config.json").exists():
        return read_model_config(settings.init)
    config = planned_config(
        dataclasses.replace(
            settings,
            vision_encoder=settings.vision_encoder or "dinov2-small",
            language_model=settings.language_model or "qwen2.5-0.5b",
        )
    )
    return toy_model(config).config if settings.tiny else config


def skeleton(config: VLMConfig) -> VisionLanguageModel:
    """The model on the meta device: shapes without weights.

    The tokenizer has no vocabulary, since no shape depends on it.
    """
    special = {token for template in TEMPLATES.values() for token in template.special}
    tokenizer: Any = SimpleNamespace(
        vocab_size=0, special_tokens=dict.fromkeys((config.chat.image_token, *special), 0)
    )
    with torch.device("meta"):
        return VisionLanguageModel(config, tokenizer)


def prepared(config: VLMConfig, settings: Settings, precision: Precision) -> VisionLanguageModel:
    """The skeleton as a run sets it up: quantised, with adapters and frozen as `settings` say.

    Each tensor has the dtype that the run holds it in.
    """
    model, meta = skeleton(config), torch.device("meta")
    set_up(model, settings, meta)
    Precision(precision.dtype, meta, settings.stochastic_rounding).place(model)
    return model
