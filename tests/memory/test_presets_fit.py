"""Presets for a card fit it, by the prediction and its margins, when every row is full."""

import pytest

from nanovlm.memory.advice import fits, on_gpu
from nanovlm.memory.predict import predict
from nanovlm.memory.shapes import batch_shape, model_config
from nanovlm.memory.stages import names_of_stages, stage_settings
from nanovlm.training.presets import preset_names

OF_A_CARD = [name for name in preset_names() if name.endswith("gb")]
CARDS = [(name, int(name.rsplit("-", 1)[1].removesuffix("gb"))) for name in OF_A_CARD]
CARDS += [  # where there is no preset for it, the base fits
    (name, 24)
    for name in ("dinov2-qwen2.5", "svlm", "smolvlm-qwen3", "mary", "basic-vlm", "zero-qwen-vl")
    if f"{name}-24gb" not in OF_A_CARD
]
STAGES = [
    pytest.param(
        preset,
        stage,
        gigabytes,
        # Each takes a second or more: the first stages for 8 GB are tried in every run.
        marks=[] if (stage, gigabytes) == ("stage1", 8) else pytest.mark.slow,
    )
    for preset, gigabytes in CARDS
    for stage in names_of_stages("all", ["--preset", preset])
]


@pytest.mark.parametrize("preset, stage, gigabytes", STAGES)
def test_a_stage_fits_its_card_when_every_row_is_full(preset, stage, gigabytes):
    settings = stage_settings(stage, ["--preset", preset])
    config = model_config(settings)
    shape = batch_shape(config, settings, settings.max_length)
    # While words are learned no text is read: a row is full with its image.
    full = settings.grid**2 if settings.objective == "words" else settings.max_length
    assert (shape.rows, shape.length) == (settings.batch_size, full)
    assert fits(predict(config, settings, shape, on_gpu(settings), 0), gigabytes)


def test_each_recipe_has_a_preset_for_8_gb():
    assert len([name for name in OF_A_CARD if name.endswith("-8gb")]) == 6
