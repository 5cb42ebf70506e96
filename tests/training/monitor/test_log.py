"""metrics.jsonl and the curves."""

import json

import pytest
import torch
from PIL import Image

from nanovlm.training.monitor import log as report
from nanovlm.training.monitor.log import RunLog, read_log
from nanovlm.utils.files import to_jsonl


def line(step: int) -> dict:
    return {
        "step": step,
        "loss": 1 / step,
        "lr_language_model": 0.1,
        "grad_norm": None if step == 2 else 1.0,
        "samples": 4 * step,
        "tokens": 40 * step,
        "images": step,
        "slots": 50 * step,
    }


def steps(run) -> list[int]:
    return [json.loads(text)["step"] for text in (run / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_written_as_they_come_and_a_resumed_run_drops_those_it_writes_again(tmp_path):
    log = RunLog(tmp_path, 0, torch.device("cpu"))
    for step in (1, 2, 3):
        speed = log.write(line(step))
        assert steps(tmp_path) == list(range(1, step + 1))
    assert speed["tokens"] == pytest.approx(10 * speed["samples"]) and speed["samples"] > 0
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # the machine lost its power here
    resumed = RunLog(tmp_path, 2, torch.device("cpu"))
    assert steps(tmp_path) == [1, 2]
    resumed.write(line(3))
    seconds = [
        json.loads(text)["seconds"]
        for text in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert seconds == sorted(seconds)


def test_memory_that_the_allocator_holds_is_logged_beside_the_peak_on_cuda(tmp_path, monkeypatch):
    RunLog(tmp_path, 0, torch.device("cpu")).write(line(1))
    assert "reserved_memory_gb" not in (tmp_path / "metrics.jsonl").read_text()
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3_000_000_000)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3_500_000_000)
    log = RunLog(tmp_path, 0, torch.device("cuda"))
    log.write(line(1))
    assert log.lines[-1]["peak_memory_gb"] == 3.0 and log.lines[-1]["reserved_memory_gb"] == 3.5


def test_curves_are_redrawn_while_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "DRAW_EVERY", 0.0)
    log = RunLog(tmp_path, 0, torch.device("cpu"))
    log.write(line(1))
    first = (tmp_path / "curves.png").read_bytes()
    log.write({**line(2), "val_loss": 3.0})
    assert (tmp_path / "curves.png").read_bytes() != first
    with Image.open(tmp_path / "curves.png") as figure:
        figure.load()


@pytest.mark.parametrize(
    "damage",
    [
        b'{"step": 1\n', b"\0\0\0\n", b"\xff\n", b"{}\n", b"[]\n", b"null\n", b"\n", b'"step"\n',
        b'{"step": "1"}\n', b'{"step": true}\n', b'{"step": 1.0}\n', b'{"step": null}\n',
        b'{"step": ' + b"1" * 400 + b"}\n",
        b'{"step": ' + b"1" * 5000 + b"}\n", b"[" * 9999 + b"\n",
    ],
)  # fmt: skip
def test_a_damaged_line_is_named_and_left_out(tmp_path, capsys, damage):
    log = RunLog(tmp_path, 0, torch.device("cpu"))
    log.write(line(1))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(damage + path.read_bytes())
    resumed = RunLog(tmp_path, 2, torch.device("cpu"))
    assert f"{path}: not a line of metrics, skipped: line 1\n" == capsys.readouterr().err
    resumed.write(line(2))
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    "key", ["seconds", "samples", "tokens", "loss", "val_loss", "lr_projector"]
)
@pytest.mark.parametrize("value", ['"x"', "null", "NaN", "-Infinity", "1e999", "[1]", "{}", "true"])
def test_a_line_with_a_damaged_number_does_not_stop_a_run(tmp_path, key, value):
    text = f'{{"step": 1, "samples": 4, "{key}": {value}}}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    log = RunLog(tmp_path, 1, torch.device("cpu"))
    log.write(line(2))
    log.draw()
    assert steps(tmp_path) == [1, 2]


def test_samples_and_bad_steps_have_the_texts_that_are_read_from_them(tmp_path, capsys):
    sample = {"step": 1, "where": "a:1", "prompt": "?", "answer": "图", "reference": "!"}
    bad = {"step": 1, "loss": "nan", "grad_norm": "inf", "records": ["a:1"]}
    for name, whole, lacking in (("samples", sample, "answer"), ("bad_steps", bad, "loss")):
        damaged = [whole | {lacking: 3}, {"step": 1}, whole | {"step": None}]
        path = tmp_path / f"{name}.jsonl"
        path.write_text(to_jsonl([whole, *damaged, whole]) + '{"step": 2, "cut')
        assert read_log(path) == [whole, whole]
        assert f"not a line of {name.replace('_', ' ')}, skipped: line 2, 3, 4\n" in (
            capsys.readouterr().err
        )
    assert read_log(tmp_path / "none.jsonl") == []
    (tmp_path / "metrics.jsonl").write_bytes(b"x\n" * 100)
    read_log(tmp_path / "metrics.jsonl")
    assert "line 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, …\n" in capsys.readouterr().err
