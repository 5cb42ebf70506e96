"""Where words are found: maps over an image and its tiles, and the picture."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from nanovlm.hub.models import load_model
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.model.projector import ProjectorConfig, build_projector
from nanovlm.training.monitor.words import FoundWord, Row, draw_words, place_map


def stand_in(kind: str = "mlp", image_length: int = 4, num_queries: int = 0, **image):
    """What `place_map` asks of a model."""
    return SimpleNamespace(
        image_length=image_length,
        projector=build_projector(ProjectorConfig(kind), 16, 16),
        config=SimpleNamespace(
            image=ImageConfig(28, 28, **image),
            vision_encoder=SimpleNamespace(num_queries=num_queries),
        ),
    )


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    path = tmp_path / "wide.png"
    Image.new("RGB", (80, 40)).save(path)
    return path


def test_visual_tokens_lie_row_by_row(wide):
    places = torch.tensor([0.1, 0.2, 0.3, 0.4])
    found = place_map(places, stand_in(), wide)
    np.testing.assert_allclose(found, [[0.1, 0.2], [0.3, 0.4]])


def test_tiles_lie_side_by_side_with_the_whole_image_over_them(wide):
    """An image of 80×40 is cut into one row of two tiles; the whole image comes last."""
    places = torch.zeros(3, 4)
    places[0, 3], places[1, 0], places[2, 1] = 0.5, 0.3, 0.2
    model = stand_in(fit="tiles", max_tiles=2)
    found = place_map(places.flatten(), model, wide)
    assert found is not None and found.sum() == pytest.approx(1)
    # The upper right place of the whole image covers that of the right tile: both columns of it.
    np.testing.assert_allclose(found, [[0, 0, 0.4, 0.1], [0, 0.5, 0, 0]], atol=1e-7)


@pytest.mark.parametrize(
    "model",
    [stand_in("resampler"), stand_in(num_queries=4), stand_in(image_length=6)],
    ids=["resampler", "encoder's resampler", "no square"],
)
def test_queries_have_no_place(model, wide):
    assert place_map(torch.full((model.image_length,), 0.1), model, wide) is None


@pytest.mark.parametrize("map", [np.eye(2), np.eye(3), None], ids=["2", "3", "none"])
def test_the_image_is_bright_where_a_word_was_found(tmp_path, map):
    word = FoundWord("红色", 0.5, True, torch.zeros(4))
    row = Row(np.ones((28, 28, 3)), "红色 正方形", [word, word], [map, map])
    draw_words(tmp_path / "words.png", [row, row])
    picture = np.asarray(Image.open(tmp_path / "words.png").convert("L"))
    grey = (picture > 20) & (picture < 60)  # of places where it was not found, 0.15 of white
    assert grey.any() == (map is not None)


def test_a_run_shows_each_word_with_its_probability(tiny, tmp_path):
    settings = {"objective": "words", "word_images": 2, "init": str(tiny.model)}
    run = tiny.train(tmp_path / "run", max_steps=2, val_every=1, **settings)
    lines = (run / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 4  # of four held-out images, twice
    assert Image.open(run / "samples.png").width > 800
    assert load_model(run / "model").image_length
