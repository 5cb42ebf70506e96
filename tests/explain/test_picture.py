"""`infer.py --explain`: the picture, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

import infer
from nanovlm.explain.attribution import ExplainedWord
from nanovlm.explain.picture import draw_explained
from nanovlm.inputs.image_config import ImageConfig
from tests.conftest import REPOSITORY

ASSETS = REPOSITORY / "nanovlm/assets"
SCENE = ASSETS / "scene.png"


@pytest.fixture
def ask(call):
    flags = "--device", "cpu", "--dtype", "float32"
    return lambda *arguments, model=ASSETS / "tiny-vlm": call(
        infer.main, *arguments, "--model", model, *flags
    )


def test_a_picture_beside_the_same_answer(ask, tmp_path):
    plain = ask(SCENE, "描述图片")
    done = ask(SCENE, "描述图片", "--explain", tmp_path / "out.png")
    assert done.returncode == 0 and done.stdout == plain.stdout
    assert f"where the words came from is drawn in {tmp_path / 'out.png'}" in done.stderr
    with Image.open(tmp_path / "out.png") as image:
        assert image.format == "PNG" and image.width > 1000 and np.asarray(image).std() > 5


def test_several_images_have_a_row_each(ask, tmp_path):
    for count in (1, 2):
        flags = "--explain", tmp_path / f"{count}.png", "--max-new-tokens", "6"
        done = ask(*[SCENE] * count, "Describe the picture.", *flags)
        assert done.returncode == 0, done.stderr
    heights = [Image.open(tmp_path / f"{count}.png").height for count in (1, 2)]
    assert heights[1] > 1.5 * heights[0]


def test_an_image_a_thousand_times_as_wide_as_high_is_drawn(ask, tmp_path):
    Image.new("RGB", (4000, 3), "red").save(tmp_path / "wide.png")
    flags = "--explain", tmp_path / "out.png", "--max-new-tokens", "4"
    done = ask(tmp_path / "wide.png", "描述图片", *flags)
    assert done.returncode == 0 and (tmp_path / "out.png").exists(), done.stderr


def test_a_file_that_is_there_stays(ask, tmp_path):
    out = tmp_path / "out.png"
    out.write_bytes(b"mine")
    done = ask(SCENE, "描述图片", "--explain", out)
    assert done.returncode == 2 and "is there already" in done.stderr and done.stdout == ""
    assert out.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((SCENE, "描述图片", "--chat"), "leave it out, or --chat"),
        (("--batch", ASSETS, "--prompt", "a", "--out", "a.jsonl"), "leave it out, or --batch"),
        (("描述图片",), "give an image"),
        ((SCENE, "描述图片", "--quantize", "int4"), "--quantize int4 leaves no gradients"),
        ((SCENE, "描述图片", "--explain", "out.jpg"), "out.jpg: the picture is a PNG; name it so"),
    ],
)
def test_what_it_cannot_do_is_one_line(ask, tmp_path, arguments, reason):
    done = ask("--explain", tmp_path / "out.png", *arguments)
    assert done.returncode == 2 and done.stdout == "" and reason in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_place_is_as_bright_as_its_part(tmp_path):
    """A black image: what has no part is light, the largest part of a word from it is black."""
    places = torch.zeros(2, 2)
    places[0, 1] = 1.0
    words = [
        ExplainedWord("whole", (0,), 0.9, 0.0, (places,)),
        ExplainedWord("none", (1,), 0.9, 0.9, (places,)),
    ]
    path = tmp_path / "out.png"
    draw_explained(path, [Image.new("RGB", (64, 64))], words, ImageConfig(28, 28))
    grey = np.asarray(Image.open(path).convert("L")).astype(int)
    third = grey.shape[1] // 3
    middles = [grey[len(grey) // 2 :, third * i : third * (i + 1)] for i in range(3)]
    assert middles[0].min() == 0  # the image itself
    whole, none = grey[:, third : 2 * third], grey[:, 2 * third :]
    row = len(grey) // 2  # through the upper half of the images
    assert whole[row, int(third * 0.75)] == 0 and whole[row, third // 4] > 180
    assert none[row, int(third * 0.75)] > 180
