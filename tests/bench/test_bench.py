"""The bench on tiny random weights: both libraries do the same work, and the table comes out whole."""

import json
import sys
from pathlib import Path

import pytest
import torch

from nanovlm.bench import __main__ as bench_command
from nanovlm.bench.reference import Transformers
from nanovlm.bench.sides import TEXT, NanoVLM
from nanovlm.bench.tasks import ROWS, Bench
from nanovlm.errors import NanoVLMError

CPU = torch.device("cpu")


def test_both_sides_compute_the_same(weights: Path) -> None:
    vocabulary = json.loads((weights / TEXT / "config.json").read_text())["vocab_size"]
    bench = Bench(CPU, torch.float32, image_token_id=vocabulary - 1)
    ours, theirs = (
        side(weights, CPU, torch.float32, bench.image_token_id) for side in (NanoVLM, Transformers)
    )
    work = bench.work(2, 24, 8)
    torch.testing.assert_close(
        ours.encode(work.pixels), theirs.encode(work.pixels), atol=1e-4, rtol=1e-4
    )
    losses = [side.loss(side.prepare(work)) for side in (ours, theirs)]
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)
    for loss in losses:
        loss.backward()
    grads = ours.projector.up.weight.grad, theirs.projector.linear_1.weight.grad
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-3)
    prompt = bench.work(1, 24, 8)
    answers = [side.generate(side.prepare(prompt), 12, lambda: None) for side in (ours, theirs)]
    assert answers[0] == answers[1]


def test_a_step_moves_what_should_learn_and_nothing_else(weights: Path) -> None:
    bench = Bench(CPU, torch.float32, image_token_id=300)
    for side in (NanoVLM, Transformers):
        model = side(weights, CPU, torch.float32, 300)
        parts = {
            name: getattr(model, name) for name in ("vision_encoder", "projector", "language_model")
        }
        before = {
            name: [parameter.clone() for parameter in part.parameters()]
            for name, part in parts.items()
        }
        bench.training_step(model, bench.work(2, 24, 8), ("projector",))()
        moved = {
            name
            for name, part in parts.items()
            if any(not torch.equal(old, new) for old, new in zip(before[name], part.parameters()))
        }
        assert moved == {"projector"}, side.name


def run_command(monkeypatch: pytest.MonkeyPatch, weights: Path, *flags: str) -> None:
    common = ["--weights", str(weights), "--device", "cpu", "--dtype", "float32", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["bench", *common, *flags])
    monkeypatch.setattr("nanovlm.bench.tasks.MIN_SECONDS", 0)
    bench_command.main()


@pytest.mark.slow
def test_every_row_has_both_figures(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run_command(monkeypatch, weights, "--json")
    captured = capsys.readouterr()
    figures = json.loads(captured.out)
    assert list(figures) == list(ROWS)
    assert all(
        set(figure) == {"nanovlm", "transformers"} and min(figure.values()) > 0
        for figure in figures.values()
    )
    assert "the first 65 of 65 greedy tokens are equal" in captured.err


def test_without_transformers_nanovlm_stands_alone(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run_command(monkeypatch, weights, "--only", "encode")
    captured = capsys.readouterr()
    assert "transformers is not installed" in captured.err
    header, line = captured.out.rstrip("\n").splitlines()
    assert "image encoding" in line and line.endswith("—")


def test_ratios_say_who_is_better() -> None:
    assert ROWS["decode"].ratio(30, 10) == 3
    assert ROWS["memory"].ratio(3, 6) == 2 == ROWS["first_token"].ratio(3, 6)


@pytest.mark.parametrize(
    "flags, message", [(("--only", "encode,nap"), "nap"), (("--rounds", "0"), "--rounds")]
)
def test_wrong_flags_are_named(
    flags: tuple[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NanoVLMError, match=message):
        run_command(monkeypatch, tmp_path, *flags)


def test_missing_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NanoVLMError, match=f"{TEXT}.config.json"):
        run_command(monkeypatch, tmp_path)
