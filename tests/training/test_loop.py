"""The loop keeps its promises: accumulation is exact, frozen parts stay, an interrupted run continues to the same bits."""

import json
import math
import signal
from pathlib import Path

import pytest
import torch

from nanovlm.errors import NanoVLMError
from nanovlm.training import loop
from nanovlm.vlm import VisionLanguageModel
from nanovlm.weights.loading import open_checkpoint

EVERYTHING = "projector,text,vision"
CLOCK = ("seconds", "samples_per_second", "tokens_per_second")


def metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl without what the clock says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint.keys()}


def moved(before: Path, after: Path) -> dict[str, bool]:
    old, new = tensors(before), tensors(after)
    assert old.keys() == new.keys()
    return {name: not torch.equal(old[name], new[name]) for name in old}


@pytest.fixture
def watch(monkeypatch):
    """Have a function called with every optimizer when its step is about to be taken."""
    def attach(on_step) -> None:
        build = loop.build_optimizer

        def watched(model, settings):
            optimizer = build(model, settings)
            optimizer.register_step_pre_hook(lambda *_: on_step(model))
            return optimizer
        monkeypatch.setattr(loop, "build_optimizer", watched)
    return attach


def interrupt_at(monkeypatch, step: int) -> None:
    """Press Ctrl-C in the middle of optimizer step number `step` (from 0)."""
    schedule = loop.schedule

    def pressed(current, *rest):
        if current == step:
            signal.raise_signal(signal.SIGINT)
        return schedule(current, *rest)
    monkeypatch.setattr(loop, "schedule", pressed)


def test_accumulated_batches_equal_one_large_batch(tiny, tmp_path, watch):
    steps: list[dict[str, torch.Tensor]] = []
    watch(lambda model: steps.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()}))
    runs = {}
    for batch_size, accumulate in ((12, 1), (6, 2), (4, 3), (1, 12)):
        steps.clear()
        run = tiny.train(tmp_path / f"{batch_size}", init=str(tiny.model), train=EVERYTHING, max_steps=2, clip=1e9,
                         batch_size=batch_size, accumulate=accumulate)
        runs[batch_size] = list(steps), metrics(run)
    (first, _), whole = runs[12]
    assert len(first) > 30 and max(gradient.abs().max() for gradient in first.values()) > 0.01
    for (gradients, _), lines in (runs[6], runs[4], runs[1]):
        for name, expected in first.items():
            torch.testing.assert_close(gradients[name], expected, atol=1e-6, rtol=0, msg=name)
        for line, expected in zip(lines, whole, strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], abs=1e-5)
            assert line["grad_norm"] == pytest.approx(expected["grad_norm"], abs=1e-4)
            assert line["samples"] == expected["samples"] and line["lr"] == expected["lr"]


def test_the_batches_of_that_step_had_unequal_numbers_of_labelled_tokens(tiny, tmp_path, monkeypatch):
    counts, forward = [], VisionLanguageModel.forward
    monkeypatch.setattr(VisionLanguageModel, "forward", lambda model, batch: counts.append(len(batch.targets)) or forward(model, batch))
    tiny.train(tmp_path / "run", init=str(tiny.model), val="", val_fraction=0.0, max_steps=1, batch_size=4, accumulate=3)
    assert len(counts) == 3 and len(set(counts)) > 1


@pytest.mark.parametrize("parts", ["projector", "projector,text", "vision", EVERYTHING])
def test_the_named_parts_move_and_the_others_keep_every_bit(tiny, tmp_path, parts):
    run = tiny.train(tmp_path / "run", init=str(tiny.model), train=parts, share=1, val="", val_fraction=0.0)
    names = {"projector": "projector", "text": "decoder", "vision": "vision"}
    learning = {names[part] for part in parts.split(",")}
    for name, changed in moved(tiny.model, run / "model").items():
        assert changed == (name.split(".")[0] in learning), name
    assert {name.split(".")[0] for name in tensors(run / "checkpoints" / "step_4" / "model.safetensors")} == learning


def test_clipping_bounds_the_norm_and_the_log_tells_the_norm_before_it(tiny, tmp_path, watch):
    norms = []
    watch(lambda model: norms.append(math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in model.parameters()
                                                   if parameter.grad is not None))))
    run = tiny.train(tmp_path / "run", init=str(tiny.model), train=EVERYTHING, clip=0.01)
    assert norms == pytest.approx([0.01] * 4, rel=1e-3)
    assert all(line["grad_norm"] > 0.1 for line in metrics(run))


@pytest.mark.parametrize(("workers", "presses"), [(0, [0, 4]), (2, [2])])
def test_an_interrupted_run_continues_to_the_same_bits(tiny, tmp_path, monkeypatch, capsys, workers, presses):
    # 14 records a step of 60: batches and steps straddle the epochs; lines are half gathered when it stops.
    settings = dict(init=str(tiny.model), train=EVERYTHING, batch_size=7, accumulate=2, max_steps=7, log_every=2, val_every=3,
                    weight_decay=0.1)
    whole = tiny.train(tmp_path / "whole", **settings)
    for resumed, step in enumerate(presses):
        with monkeypatch.context() as patch:
            interrupt_at(patch, step)
            with pytest.raises(KeyboardInterrupt):
                tiny.train(tmp_path / "stopped", **settings, workers=workers, resume=bool(resumed))
        assert f"stopped after step {step + 1} of 7" in (told := capsys.readouterr().err)
        assert f"--resume --out {tmp_path / 'stopped'}" in told
        assert (tmp_path / "stopped" / "curves.png").exists() and not (tmp_path / "stopped" / "model").exists()
    stopped = tiny.train(tmp_path / "stopped", **settings, workers=workers, resume=True)
    assert metrics(stopped) == metrics(whole)
    assert [line["step"] for line in metrics(whole)] == [2, 3, 4, 6, 7]
    for name in ("model/model.safetensors", "samples.jsonl", *(f"checkpoints/step_7/{kind}" for kind in (
            "model.safetensors", "optimizer.safetensors", "state.json"))):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name


def test_fp16_drops_a_step_that_overflows_and_its_factor_survives_an_interruption(tiny, tmp_path, monkeypatch, watch):
    settings = dict(init=str(tiny.model), dtype="fp16", max_steps=4)
    monkeypatch.setattr(loop.Precision, "scaled", lambda precision, loss: loss * precision.scaler.scale * (
        math.inf if loss_number.append(0) or len(loss_number) == 2 else 1))
    taken, loss_number = [], []
    watch(lambda model: taken.append(0))
    run = tiny.train(tmp_path / "run", **settings)
    assert len(taken) == 3
    lines = metrics(run)
    assert lines[1]["grad_norm"] is None and all(math.isfinite(line["loss"]) for line in lines)
    state = json.loads((run / "checkpoints" / "step_4" / "state.json").read_text())
    assert state["scaler"] == {"scale": 2.0**15, "growth_interval": 1000, "good_steps": 2}

    loss_number.clear()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 2)
        tiny.train(tmp_path / "stopped", **settings)
    stopped = tiny.train(tmp_path / "stopped", **settings, resume=True)
    assert metrics(stopped) == lines
    assert json.loads((stopped / "checkpoints" / "step_4" / "state.json").read_text()) == state


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_what_is_not_finite_stops_the_run_before_it_is_saved(tiny, tmp_path, monkeypatch, what):
    forward, calls = VisionLanguageModel.forward, []

    def broken(model, batch):
        loss, third = forward(model, batch), calls.append(0) or len(calls) == 3
        if third and what == "loss":
            return loss * math.nan
        if third:
            loss.register_hook(lambda gradient: gradient * math.nan)
        return loss
    monkeypatch.setattr(VisionLanguageModel, "forward", broken)
    with pytest.raises(NanoVLMError, match=f"the {what} is nan at step 3; lower --lr"):
        tiny.train(tmp_path / "run", init=str(tiny.model), log_every=100, save_every=1)
    assert sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_1", "step_2"]


def test_a_run_stopped_before_its_first_checkpoint_starts_again(tiny, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(NanoVLMError, match="the loss is nan at step 1"):
        patch.setattr(VisionLanguageModel, "forward", lambda model, batch: batch.pixels.sum() * math.nan)
        tiny.train(tmp_path / "run", init=str(tiny.model))
    run = tiny.train(tmp_path / "run", init=str(tiny.model), resume=True)
    assert "stopped before its first checkpoint" in capsys.readouterr().err
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]


def test_text_without_images_passes_through_a_stage_that_cannot_learn_from_it(tiny, tmp_path):
    records = [{"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好。"}]}] * 4
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run = tiny.train(tmp_path / "run", init=str(tiny.model), data=str(tmp_path / "text.jsonl"), val="", val_fraction=0.0)
    assert not any(moved(tiny.model, run / "model").values())
    assert [line["grad_norm"] for line in metrics(run)] == [0.0] * 4
