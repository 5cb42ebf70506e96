"""The shapes that memory depends on, without weights or words: a model of `config.json` files, and a step's batch."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from nanovlm.data.preferences import PairBatch
from nanovlm.errors import NanoVLMError
from nanovlm.hub.models import parse_model_config
from nanovlm.hub.toy import toy_model
from nanovlm.inputs.batch import Batch
from nanovlm.inputs.chat import TEMPLATES
from nanovlm.model.vlm import VisionLanguageModel, VLMConfig
from nanovlm.training.building import planned_config, set_up
from nanovlm.training.precision import Precision
from nanovlm.training.settings import Settings
from nanovlm.utils.files import read_json

TEXT_TOKENS = 64  # of a sample, where nothing else is said


@dataclass(frozen=True)
class Work:
    """The batch of one forward pass: `rows` of `length` tokens, `images` in all (where they are cut into tiles, pictures),
    `targets` labelled tokens in all, of `pairs` of answers where one of two is preferred."""

    rows: int
    length: int
    images: int
    targets: int
    pairs: int = 0

    def batch(
        self, config: VLMConfig, image_length: int, features: torch.dtype | None = None
    ) -> Batch:
        """Random words and pixels of this shape, or in place of pixels patch vectors of the dtype `features`. The images'
        places come first in each row, its labels last."""
        ids = torch.randint(config.language_model.vocab_size, (self.rows, self.length))
        positions = torch.arange(self.rows * self.length).view(self.rows, self.length)
        labelled, pictured = self.targets // self.rows, self.images * image_length // self.rows
        image_positions, target_positions = (
            positions[:, :pictured].flatten(),
            positions[:, -labelled - 1 : -1].flatten(),
        )
        batch = Batch(
            ids,
            torch.ones_like(ids),
            image_positions,
            target_positions,
            torch.randint(config.language_model.vocab_size, (self.targets,)),
        )
        if self.pairs:
            batch = PairBatch(
                **vars(batch),
                lengths=torch.full((2 * self.pairs,), self.targets // self.pairs // 2),
                reference=torch.zeros(self.pairs, 2),
            )
        if features:
            batch.patches = torch.randn(feature_shape(config, self.images), dtype=features)
        else:
            batch.pixels = torch.randn(self.images, 3, config.image.height, config.image.width)
        return batch


def feature_shape(config: VLMConfig, images: int) -> tuple[int, int, int]:
    """(N, P, C_v) of the patch vectors that the eyes give."""
    vision, image, layer = config.vision_encoder, config.image, config.vision_layer
    return images, vision.num_features(image.height, image.width, layer), vision.feature_size(layer)


def work_of(config: VLMConfig, settings: Settings, tokens: int | None = None) -> Work:
    """The batch of `settings`: rows of `tokens` tokens, images included. Without `tokens`, samples of TEXT_TOKENS words
    beside their image, that share or pack rows as the settings say. Half of the words are labelled. In a pair of answers
    they are two thirds of its words: both answers share a row with their image and prompt, and with no other pair. An image
    that is cut into tiles is a square one, the largest there is."""
    image_length, pairs = skeleton(config).max_image_length, settings.objective == "dpo"
    text = TEXT_TOKENS // 2 * 3 if pairs else TEXT_TOKENS
    images_a_row = 1
    if tokens:
        rows, length = settings.batch_size, tokens
    elif settings.pack:
        images_a_row = max(1, settings.pack // (image_length + text))
        rows, length = math.ceil(settings.batch_size / images_a_row), settings.pack
    else:
        share = 1 if pairs else min(settings.share, settings.batch_size)
        rows, length = math.ceil(settings.batch_size / share), image_length + share * text
    words = length - images_a_row * image_length
    if words < (3 * images_a_row if pairs else 2):
        raise NanoVLMError(
            f"a row of {length} tokens has no room for an image of {image_length} and words; raise "
            + ("--tokens" if tokens else "--pack")
        )
    images = rows * images_a_row
    if pairs:
        return Work(
            rows,
            length,
            images * config.image.max_tiles_per_image,
            images * 2 * (words // images_a_row // 3),
            images,
        )
    return Work(rows, length, images * config.image.max_tiles_per_image, rows * max(1, words // 2))


def model_config(settings: Settings) -> VLMConfig:
    """The shapes `settings` start from: those of --vision-encoder and --language-model, folders or names of published ones, or --init's."""
    if (
        settings.init
        and not (settings.vision_encoder or settings.language_model)
        and Path(settings.init, "config.json").exists()
    ):
        return parse_model_config(read_json(Path(settings.init, "config.json")))
    config = planned_config(
        dataclasses.replace(
            settings,
            vision_encoder=settings.vision_encoder or "dinov2-small",
            language_model=settings.language_model or "qwen2.5-0.5b",
        )
    )
    return toy_model(config).config if settings.tiny else config


def skeleton(config: VLMConfig) -> VisionLanguageModel:
    """The model on the meta device: every shape and no weight. No words either, since no shape depends on them."""
    special = {token for template in TEMPLATES.values() for token in template.special}
    words = SimpleNamespace(
        vocab_size=0, special_tokens=dict.fromkeys((config.chat.image_token, *special), 0)
    )
    with torch.device("meta"):
        return VisionLanguageModel(config, words)


def prepared(config: VLMConfig, settings: Settings, precision: Precision) -> VisionLanguageModel:
    """The skeleton as a run sets it up: what is quantised, adapted and frozen, each tensor in its number format."""
    model, meta = skeleton(config), torch.device("meta")
    set_up(model, settings, meta)
    Precision(precision.dtype, meta, settings.stochastic_rounding).place(model)
    return model
