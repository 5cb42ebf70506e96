"""The bench on tiny random weights: both libraries do the same work, and the table is complete."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanovlm.bench import __main__ as bench_command
from nanovlm.bench import answers, limits, tasks
from nanovlm.bench.models import LANGUAGE_MODEL, NanoVLMModel
from nanovlm.bench.tasks import ROWS, Bench
from nanovlm.bench.transformers_model import TransformersModel
from nanovlm.errors import NanoVLMError

CPU = torch.device("cpu")


def test_both_libraries_compute_the_same(weights: Path) -> None:
    config = json.loads((weights / LANGUAGE_MODEL / "config.json").read_text())
    bench = Bench(CPU, torch.float32, image_token_id=config["vocab_size"] - 1)
    models = [
        kind(weights, CPU, torch.float32, bench.image_token_id)
        for kind in (NanoVLMModel, TransformersModel)
    ]
    inputs = bench.inputs(2, 24, 8)
    features = [model.encode(inputs.pixels) for model in models]
    torch.testing.assert_close(*features, atol=1e-4, rtol=1e-4)
    losses = [model.loss(model.prepare(inputs)) for model in models]
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)
    for loss in losses:
        loss.backward()
    grads = models[0].projector.up.weight.grad, models[1].projector.linear_1.weight.grad
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-3)
    prompt = bench.inputs(1, 24, 8)
    answers = [model.generate(model.prepare(prompt), 12, lambda: None) for model in models]
    assert answers[0] == answers[1]


def test_a_step_updates_what_is_trainable_and_nothing_else(weights: Path) -> None:
    bench = Bench(CPU, torch.float32, image_token_id=300)
    for kind in (NanoVLMModel, TransformersModel):
        model = kind(weights, CPU, torch.float32, 300)
        parts = {
            name: getattr(model, name) for name in ("vision_encoder", "projector", "language_model")
        }
        before = {
            name: [parameter.clone() for parameter in part.parameters()]
            for name, part in parts.items()
        }
        bench.training_step(model, bench.inputs(2, 24, 8), ("projector",))()
        moved = {
            name
            for name, part in parts.items()
            if any(not torch.equal(old, new) for old, new in zip(before[name], part.parameters()))
        }
        assert moved == {"projector"}, model.name


def run_command(monkeypatch: pytest.MonkeyPatch, weights: Path, *flags: str) -> None:
    common = ["--weights", str(weights), "--device", "cpu", "--dtype", "float32", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["bench", *common, *flags])
    monkeypatch.setattr("nanovlm.bench.tasks.MIN_SECONDS", 0)
    monkeypatch.setattr(limits, "PRODUCT", 64)
    monkeypatch.setattr(limits, "READ", 2**20)
    bench_command.main()


@pytest.mark.slow
def test_every_row_has_both_figures(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run_command(monkeypatch, weights, "--json")
    captured = capsys.readouterr()
    figures = json.loads(captured.out)
    assert list(figures) == list(ROWS)
    for row, figure in figures.items():
        expected = {"nanovlm", "transformers"} | ({"limit"} if row != "memory" else set())
        assert set(figure) == expected and min(figure.values()) > 0
    assert "limits: products " in captured.err and " GB/s" in captured.err
    assert "the first 65 of 65 greedy tokens are equal" in captured.err


def test_without_transformers_there_are_nanovlms_figures_alone(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run_command(monkeypatch, weights, "--only", "encode")
    captured = capsys.readouterr()
    assert "transformers is not installed" in captured.err
    _, line = captured.out.rstrip("\n").splitlines()
    assert re.search(r"image encoding.* — +— +[\d,]+%$", line)


def test_a_share_is_what_the_work_would_take_at_the_speed_of_its_limit(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rates and of times alike; against PyTorch's count of FLOPs, which bf16 shows whole."""
    vocabulary = json.loads((weights / LANGUAGE_MODEL / "config.json").read_text())["vocab_size"]
    bench = Bench(CPU, torch.bfloat16, image_token_id=vocabulary - 1)
    model = NanoVLMModel(weights, CPU, torch.bfloat16, bench.image_token_id)
    monkeypatch.setattr(limits, "PRODUCT", 64)
    monkeypatch.setattr(limits, "READ", 2**20)
    known = limits.Limits(bench)
    monkeypatch.setattr(known, "_measure", lambda: (1e9, 2e9))  # FLOP/s, bytes/s

    inputs = bench.inputs(8, 32, 16)
    bench.training_step(model, inputs, ("projector",))  # which freezes the other parts
    with FlopCounterMode(display=False) as counter:
        model.loss(model.prepare(inputs)).backward()
    samples = known.task("stage1", model)()["stage1"]
    assert samples == pytest.approx(8 * 1e9 / counter.get_total_flops(), rel=0.02)

    images = bench.inputs(32, 32, 16).pixels
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.encode(images)
    rate = known.task("encode", model)()["encode"]
    assert rate == pytest.approx(32 * 1e9 / counter.get_total_flops(), rel=0.02)

    figures = known.task("generate", model)()
    prompt = model.prepare(bench.inputs(1, 24, 1))
    with FlopCounterMode(display=False) as counter:
        model.generate(prompt, 1, lambda: None)
    assert figures["first_token"] == pytest.approx(counter.get_total_flops() / 1e9, rel=0.02)
    language_model = model.model.language_model
    read = sum(weight.nbytes for weight in language_model.parameters())  # the head is tied
    assert figures["decode"] == pytest.approx(2e9 / read)


def test_ratios_are_above_one_where_nanovlm_is_better() -> None:
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
    with pytest.raises(NanoVLMError, match=f"{LANGUAGE_MODEL}.config.json"):
        run_command(monkeypatch, tmp_path)


def test_ways_to_answer_are_compared(
    weights: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "NEW_TOKENS", 4)
    monkeypatch.setattr(tasks, "NEW_TOKENS", 4)
    monkeypatch.setattr(answers, "READ", 2**20)
    run_command(monkeypatch, weights, "--answers", "--json")
    figures = json.loads(capsys.readouterr().out)
    decode = figures["decode"]
    assert list(decode) == ["transformers", "nanovlm", "int8", "int4"]
    assert decode["nanovlm"]["agreement"] == 1 and decode["int8"]["agreement"] > 0
    assert decode["int8"]["bytes"] < decode["nanovlm"]["bytes"]  # toy widths fill no int4 block
    assert set(figures["second_turn"]) == {"read_again", "kept"}
    assert set(figures["together"]) == {"one_by_one", "together"}
    lines = answers.table(figures).splitlines()
    assert len(lines) == 7 and "16 requests of 4 tokens" in lines[-1]
