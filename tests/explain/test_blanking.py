"""Blanked patches: the shipped model's explanations hold on its toy world, and shuffled ones do
not."""

import dataclasses
from statistics import fmean

import pytest
import torch

from nanovlm.data.collate import prepare
from nanovlm.explain import blanking
from nanovlm.explain.__main__ import main
from nanovlm.generate import generate
from nanovlm.hub.models import load_model
from nanovlm.inputs.chat import IMAGE, Message
from nanovlm.inputs.image import open_image
from tests.conftest import REPOSITORY

ASSETS = REPOSITORY / "nanovlm/assets"


@pytest.fixture(scope="module")
def drops_on_scenes():
    """A function that measures two shipped scenes, with what `explain` gives changed by another."""
    model = load_model(ASSETS / "tiny-vlm").float().eval()
    asked = []
    for name in ("scene.png", "scene3.png"):
        images = [open_image(ASSETS / name)]
        question = [Message("user", (IMAGE, "\n", "描述图片"))]
        prompt = prepare(model, [question], [images], add_generation_prompt=True)
        answer = generate(model, prompt, 60)[0]
        asked.append((prompt, images, answer, blanking.explain(model, prompt, images, answer)))

    def measure(monkeypatch, change=lambda places: places) -> list[blanking.Drop]:
        generator, drops = torch.Generator().manual_seed(0), []
        for prompt, images, answer, words in asked:
            changed = [
                dataclasses.replace(word, maps=tuple(change(places) for places in word.maps))
                for word in words
            ]
            monkeypatch.setattr(blanking, "explain", lambda *_, changed=changed: changed)
            drops += blanking.blanking_drops(model, prompt, images, answer, generator)
        return drops

    return measure


def test_words_need_their_own_patches(drops_on_scenes, monkeypatch):
    drops = drops_on_scenes(monkeypatch)
    assert len(drops) > 10
    own, random, other = (fmean(numbers) for numbers in zip(*drops))
    assert own > 2 and own > 4 * random and own > 1.3 * other
    assert fmean(drop.top > drop.random for drop in drops) > 0.7


def test_shuffled_patches_are_no_better_than_random_ones(drops_on_scenes, monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def shuffled(places: torch.Tensor) -> torch.Tensor:
        order = torch.randperm(places.numel(), generator=generator)
        return places.flatten()[order].view_as(places)

    own, random, _ = (fmean(n) for n in zip(*drops_on_scenes(monkeypatch, shuffled)))
    assert own < 2 and own < 3 * random + 0.5


def test_the_command_prints_one_line(tiny, call):
    done = call(
        main,
        *("--model", ASSETS / "tiny-vlm", "--data", tiny.data / "val.jsonl", "--limit", "1"),
        *("--device", "cpu", "--dtype", "float32"),
    )
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr
    assert '"top": ' in done.stdout and '"n": 1}' in done.stdout


def test_the_command_refuses_in_one_line(tiny, call, tmp_path):
    flags = ["--model", tiny.model, "--data", tiny.data / "val.jsonl", "--device", "cpu"]
    done = call(main, *flags, "--quantize", "int8")
    assert done.returncode == 2 and "--quantize int8 leaves no gradients" in done.stderr
    assert call(main, *flags, "--limit", "-1").returncode == 2
    text = tmp_path / "text.jsonl"
    text.write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    done = call(main, "--model", tiny.model, "--data", text)
    assert done.returncode == 2 and "no record has an image" in done.stderr
