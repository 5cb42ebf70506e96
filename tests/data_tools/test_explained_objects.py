"""Outlines of the toy world's objects; the shipped model's words come from inside them."""

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest

from data_tools.explained_objects import main, named_pairs, scene_of
from data_tools.scenes_world import coverage, draw, random_scene
from nanovlm.data.records import read_records
from nanovlm.errors import NanoVLMError
from nanovlm.explain.attribution import ExplainedWord
from tests.conftest import REPOSITORY


def test_an_outline_covers_the_pixels_that_the_object_changes():
    scene = random_scene(Random(3))
    first, *others = scene.objects
    without = type(scene)(tuple(others), scene.background, scene.background_seed)
    changed = (np.asarray(draw(scene)) != np.asarray(draw(without))).any(axis=2)
    assert changed.any() and not (changed & (np.asarray(coverage(first)) == 0)).any()
    assert changed[np.asarray(coverage(first)) == 255].all()


def test_a_scene_is_composed_anew_from_its_record(tiny, tmp_path):
    record = read_records(tiny.data / "val.jsonl")[0][0]
    scene = scene_of(record)
    assert len(scene.objects) == len(record.extra["objects"])
    for thing, said in zip(scene.objects, record.extra["objects"]):
        assert (thing.colour, thing.shape, thing.x) == (said["colour"], said["shape"], said["x"])
    folder = tmp_path / "images" / "val"
    folder.mkdir(parents=True)
    (tmp_path / "world.json").write_text('{"seed": 1}')
    (folder / "000000.png").write_bytes(record.images[0].read_bytes())
    other = type(record)("a", (folder / "000000.png",), record.messages, (), {})
    with pytest.raises(NanoVLMError, match="is no scene of the toy world"):
        scene_of(other)


def test_a_colour_belongs_to_the_shape_after_it():
    words = [
        ExplainedWord(text, (i,), 1.0, 0.0, ())
        for i, text in enumerate(["a", "红色", "圆环", "blue", "star"])
    ]
    assert [pair for pair, _ in named_pairs(words)] == [("red", "ring"), ("blue", "star")]


def test_words_of_an_object_come_from_inside_its_outline(tiny, call):
    model: Path = REPOSITORY / "nanovlm/assets/tiny-vlm"
    flags = "--model", model, "--data", tiny.data / "val.jsonl", "--device", "cpu"
    done = call(main, *flags, "--dtype", "float32", "--limit", "3")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["words"] >= 4 and figures["inside"] > 4 * figures["area"]
    refused = call(main, *flags, "--quantize", "int4")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
