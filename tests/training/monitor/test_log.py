"""metrics.jsonl and the curves."""

import json

import pytest
import torch
from PIL import Image

from nanovlm.training.monitor import log as report
from nanovlm.training.monitor.log import RunLog


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
