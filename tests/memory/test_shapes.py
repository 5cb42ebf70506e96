"""Shapes come from config files and names alone, and a batch from the settings."""

import dataclasses
import json
from pathlib import Path

import pytest

from nanovlm.data.words import WordBatch
from nanovlm.errors import NanoVLMError
from nanovlm.hub.models import load_model
from nanovlm.hub.shapes import LANGUAGE_MODELS, VISION_ENCODERS
from nanovlm.memory.shapes import batch_shape, model_config, random_batch, skeleton
from nanovlm.training.monitor.walk import BatchShape
from nanovlm.training.settings import Settings


def test_a_skeleton_has_the_models_shapes_and_no_weights(tiny):
    real = load_model(tiny.model)
    for settings in (
        Settings(init=str(tiny.model)),
        Settings(vision_encoder=str(tiny.vision_encoder), language_model=str(tiny.language_model)),
    ):
        model = skeleton(model_config(settings))
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        assert shapes == {name: parameter.shape for name, parameter in real.named_parameters()}
        assert all(parameter.is_meta for parameter in model.parameters())
        assert model.image_length == real.image_length


def test_published_shapes_by_name():
    config = model_config(Settings(vision_encoder="dinov2-base", language_model="qwen2.5-0.5b"))
    assert (config.vision_encoder, config.language_model) == (
        VISION_ENCODERS["dinov2-base"].vision_encoder,
        LANGUAGE_MODELS["qwen2.5-0.5b"].language_model,
    )
    model = skeleton(config)  # as the model cards say: 86.6 and 494 million
    assert sum(parameter.numel() for parameter in model.vision_encoder.parameters()) == 86_579_712
    assert sum(parameter.numel() for parameter in model.language_model.parameters()) == 494_032_768


def test_a_config_alone_is_enough(tiny, tmp_path: Path):
    (tmp_path / "config.json").write_text((tiny.language_model / "config.json").read_text())
    assert (
        model_config(Settings(language_model=str(tmp_path))).language_model.hidden_size
        == json.loads((tiny.language_model / "config.json").read_text())["hidden_size"]
    )


def test_tiny_is_the_preset_at_toy_widths():
    config = model_config(
        Settings(vision_encoder="clip-large-336", language_model="qwen-7b", tiny=True)
    )
    assert (
        config.language_model.logn_attention
        and config.language_model.hidden_size == 64
        and config.image.height == 64
    )


def test_an_image_cut_into_tiles_counts_as_many_as_a_square_one():
    config = model_config(Settings(batch_size=3, share=1))
    config = dataclasses.replace(
        config, image=dataclasses.replace(config.image, fit="tiles", max_tiles=2)
    )
    shape = batch_shape(config, Settings(batch_size=3, share=1))
    assert shape == BatchShape(3, 5 * 256 + 64, 15, 3 * 32)
    batch = random_batch(skeleton(config), shape)
    assert batch.pixels.shape == (15, 3, 224, 224) and len(batch.image_positions) == 15 * 256


@pytest.mark.parametrize(
    ("changes", "tokens", "expected"),
    [
        ({"batch_size": 3}, None, BatchShape(3, 256 + 32 + 2 * 32, 3, 3 * 64, pairs=3)),
        ({"batch_size": 2}, 512, BatchShape(2, 512, 2, 2 * 2 * 85, pairs=2)),
        ({"batch_size": 4, "pack": 1024}, None, BatchShape(2, 1024, 4, 4 * 2 * 85, pairs=4)),
    ],
)
def test_a_pair_of_answers_shares_its_row_with_image_and_prompt_alone(
    changes: dict, tokens: int | None, expected: BatchShape
):
    settings = Settings(objective="dpo", init="somewhere", **changes)
    config = model_config(settings)
    shape = batch_shape(config, settings, tokens)
    batch = random_batch(skeleton(config), shape)
    assert shape == expected
    assert (
        batch.lengths.sum() == len(batch.targets) == len(batch.target_positions)
        and len(batch.lengths) == 2 * shape.pairs
    )


def test_a_row_of_words_holds_visual_tokens_alone():
    settings = Settings(objective="words", batch_size=3, max_words=50, cache_features=True)
    config = model_config(settings)
    shape = batch_shape(config, settings, 512)
    assert shape == BatchShape(3, 256, 3, 0, cached_features=True, words=50)
    batch = random_batch(skeleton(config), shape)
    assert isinstance(batch, WordBatch)
    assert batch.counts.shape == (3, 50) and batch.lengths == (256, 256, 256)
    assert BatchShape.of(batch, 256) == shape
    many = dataclasses.replace(settings, max_words=10**6)
    assert batch_shape(config, many).words == config.language_model.vocab_size


@pytest.mark.parametrize(
    ("settings", "tokens", "expected"),
    [
        (Settings(batch_size=4), 512, BatchShape(4, 512, 4, 4 * 128)),
        (Settings(batch_size=32, share=8), None, BatchShape(4, 256 + 8 * 64, 4, 4 * 256)),
        (Settings(batch_size=8, pack=1024), None, BatchShape(3, 1024, 9, 3 * 128)),
    ],
)
def test_the_batch_of_the_settings(settings: Settings, tokens: int | None, expected: BatchShape):
    config = model_config(settings)
    shape = batch_shape(config, settings, tokens)
    batch = random_batch(skeleton(config), shape)
    assert shape == expected
    assert batch.input_ids.shape == (expected.rows, expected.length)
    assert (
        len(batch.image_positions) == expected.images * 256
        and len(batch.targets) == expected.targets
    )
    assert not set(batch.image_positions.tolist()) & set((batch.target_positions + 1).tolist())


@pytest.mark.parametrize(
    ("settings", "tokens", "message"),
    [
        (Settings(vision_encoder="nowhere"), None, "--vision-encoder nowhere.*dinov2-small"),
        (Settings(language_model="nowhere"), None, "--language-model nowhere.*qwen2.5-0.5b"),
        (Settings(), 256, "256 tokens.*--tokens"),
        (Settings(language_model_shape="svlm"), 1025, "1025 tokens is longer than the 1024 pos"),
    ],
)
def test_what_cannot_be_planned_is_one_line(settings: Settings, tokens: int | None, message: str):
    with pytest.raises(NanoVLMError, match=message) as caught:
        batch_shape(model_config(settings), settings, tokens)
    assert "\n" not in str(caught.value)
