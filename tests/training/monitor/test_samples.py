"""Questions asked at each validation: always the same, without an effect on training."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nanovlm.data.records import read_records
from nanovlm.errors import NanoVLMError
from nanovlm.hub.models import load_model
from nanovlm.training.monitor import samples
from nanovlm.training.monitor.samples import Samples, draw_answers, last_answers, wrap
from nanovlm.training.precision import Precision

PRECISIONS = {
    name: Precision(dtype, torch.device("cpu"))
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
}


@pytest.fixture(scope="module")
def records(tiny):
    return read_records(tiny.data / "val.jsonl")[0]


@pytest.fixture
def model(tiny):
    return load_model(tiny.model).train()


def answered(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def colours(path: Path) -> set[tuple[int, int, int]]:
    with Image.open(path) as figure:
        return {colour for _, colour in figure.convert("RGB").getcolors(1 << 20)}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_questions_are_answered_each_time_and_the_model_is_as_before(
    tmp_path, records, model, precision
):
    watched = Samples(tmp_path, records, 0)
    before, random_state = (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        torch.get_rng_state(),
    )
    for step in (5, 10):
        watched.answer(model, step, PRECISIONS[precision])
    assert torch.equal(torch.get_rng_state(), random_state) and all(
        module.training for module in model.modules()
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    lines = answered(tmp_path)
    assert [line["step"] for line in lines] == [5] * 6 + [10] * 6
    assert [line | {"step": 0} for line in lines[:6]] == [line | {"step": 0} for line in lines[6:]]
    assert len({line["where"] for line in lines}) == 6 and all(
        line["prompt"] and line["reference"] for line in lines
    )
    model.projector(torch.randn(1, 4, 16)).sum().backward()  # and can still be trained


def test_answering_leaves_the_training_bits_alone(tiny, tmp_path):
    weights = []
    for val_every in (0, 1):
        run = tiny.train(
            tmp_path / f"{val_every}",
            val_every=val_every,
            train="projector,language_model",
            dtype="bfloat16",
        )
        weights.append((run / "checkpoints" / "step_4" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert [line["step"] for line in answered(run)] == [
        step for step in (1, 2, 3, 4) for _ in range(4)
    ]


def test_a_resumed_run_answers_again_what_came_after_its_checkpoint(tmp_path, records, model):
    watched = Samples(tmp_path, records, 0)
    for step in (5, 10):
        watched.answer(model, step, PRECISIONS["float32"])
    whole = (tmp_path / "samples.jsonl").read_text()
    (tmp_path / "samples.jsonl").write_text(
        whole + '{"step": 15, "whe'
    )  # the machine lost its power here
    resumed = Samples(tmp_path, records, 5)
    assert [line["step"] for line in answered(tmp_path)] == [5] * 6
    resumed.answer(model, 10, PRECISIONS["float32"])
    assert (tmp_path / "samples.jsonl").read_text() == whole


def test_the_last_answers_are_printed_without_their_step(tiny, tmp_path, capsys):
    run = tiny.train(tmp_path / "run", val_every=2)
    printed = [
        json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")
    ]
    assert printed == [json.loads(line) for line in last_answers(run).splitlines()]
    assert [list(line) for line in printed] == [["where", "prompt", "answer", "reference"]] * 4
    assert printed == [
        {key: value for key, value in line.items() if key != "step"} for line in answered(run)[-4:]
    ]


def test_an_image_that_is_gone_does_not_stop_the_training(
    tmp_path, records, model, monkeypatch, capsys
):
    def gone(path):
        raise NanoVLMError(f"{path}: is gone")

    watched = Samples(tmp_path, records, 0)
    monkeypatch.setattr("nanovlm.evaluation.answers.open_image", gone)
    watched.answer(model, 5, PRECISIONS["float32"])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(watched.watched) and all("is gone" in line for line in said)
    assert model.training and not (tmp_path / "samples.jsonl").exists()


def test_the_figure_shows_the_first_and_the_last_validations_and_what_is_right(
    tmp_path, records, monkeypatch
):
    columns, texts, write = {}, [], samples._Page.write

    def draw(path, images, drawn):
        columns.update(drawn)
        draw_answers(path, images, drawn)

    monkeypatch.setattr(samples, "draw_answers", draw)
    monkeypatch.setattr(
        samples._Page,
        "write",
        lambda *given, **style: texts.append(given[3]) or write(*given, **style),
    )
    watched = Samples(tmp_path, records[:1], 0)
    watched.lines = [
        {
            "step": step,
            "where": records[0].where,
            "prompt": "Colour?",
            "answer": "Red." if step > 60 else f"no {step}",
            "reference": "red",
        }
        for step in range(10, 90, 10)
    ]
    watched.draw()
    titles = [f"after step {step}" for step in (10, 40, 50, 60, 70, 80)]
    assert list(columns) == titles
    answers = ["no 10", "no 40", "no 50", "no 60", "Red.", "Red."]
    assert texts == [*titles, "reference", "Colour?", *answers, "red"]
    with Image.open(tmp_path / "samples.png") as figure:
        pixels = np.asarray(figure.convert("RGB"))
    green = (pixels == (0x1A, 0x7F, 0x37)).all(-1).any(0).nonzero()[0]  # in which columns of pixels
    left, column = 1.1 * 110, 1.56 * 110  # where the first answer starts, and how wide each is
    assert left + 4 * column <= green.min() and green.max() < left + 6 * column


def test_the_figure_can_draw_any_characters_and_a_question_without_an_answer(tmp_path, capsys):
    images = {name: Image.new("RGB", (200, 30), "red") for name in ("a", "b", "c")}
    question = {"prompt": "这是什么？" * 30, "reference": "$红$ \\frac{"}
    first = {"a": {"answer": "a $b$ \\frac{ _ 😀 $", **question}}
    second = {"b": {"answer": "", **question}, "c": {"answer": "word " * 64, **question}}
    draw_answers(
        tmp_path / "samples.png", images, {"$after$ step 1": first, "after step 2": second}
    )
    assert (255, 0, 0) in colours(tmp_path / "samples.png")
    assert capsys.readouterr().err == ""


def test_rows_are_as_high_as_their_longest_answer(tmp_path):
    heights = []
    for answer in ("red", "红色的圆形" * 20):
        line = {"prompt": "?", "answer": answer, "reference": "red"}
        image = Image.new("RGB", (8, 8))
        draw_answers(tmp_path / "samples.png", {"a": image}, {"after step 1": {"a": line}})
        with Image.open(tmp_path / "samples.png") as figure:
            heights.append(figure.height)
    assert heights[1] > heights[0] + 80


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        ("a big red circle", 9, "a big red\ncircle"),
        ("红色圆形", 5, "红色\n圆形"),
        ("红色、圆形。", 4, "红色、\n圆形。"),
        ("红色）、圆形", 4, "红色）\n、圆\n形"),
        ("incomprehensible", 8, "incompre\nhensible"),
        ("a  b\nc", 20, "a b c"),
        ("", 5, ""),
    ],
)
def test_text_is_broken_between_words_and_after_any_chinese_character(text, width, expected):
    assert "\n".join(line.rstrip() for line in wrap(text, width, 9).split("\n")) == expected


def test_text_too_long_for_its_cell_ends_in_an_ellipsis():
    lines = wrap("word " * 99, 20, 5).split("\n")
    assert len(lines) == 5 and lines[-1].endswith("…") and all(len(line) <= 20 for line in lines)
