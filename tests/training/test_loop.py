"""Accumulation is exact, frozen parts stay, an interrupted run continues to the same bits."""

import errno
import itertools
import json
import math
import signal
from pathlib import Path

import pytest
import torch

from nanovlm.data.batches import Batches
from nanovlm.errors import NanoVLMError
from nanovlm.hub.loading import open_checkpoint
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training import checkpoint, loop
from tests.runs import metrics

EVERYTHING = "projector,language_model,vision_encoder"


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


def interrupt_at(monkeypatch, step: int, number: int = signal.SIGINT) -> None:
    """Press Ctrl-C, or send another signal, in the middle of step number `step` (from 0)."""
    schedule = loop.schedule

    def pressed(current, *rest):
        if current == step:
            signal.raise_signal(number)
        return schedule(current, *rest)

    monkeypatch.setattr(loop, "schedule", pressed)


def test_accumulated_batches_equal_one_large_batch(tiny, tmp_path, watch):
    steps: list[dict[str, torch.Tensor]] = []
    watch(
        lambda model: steps.append(
            {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        )
    )
    runs = {}
    for batch_size, accumulate in ((12, 1), (6, 2), (4, 3), (1, 12)):
        steps.clear()
        run = tiny.train(
            tmp_path / f"{batch_size}",
            init=str(tiny.model),
            train=EVERYTHING,
            max_steps=2,
            clip=1e9,
            batch_size=batch_size,
            accumulate=accumulate,
        )
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


def test_the_batches_of_that_step_had_unequal_numbers_of_labelled_tokens(
    tiny, tmp_path, monkeypatch
):
    counts, forward = [], VisionLanguageModel.forward
    monkeypatch.setattr(
        VisionLanguageModel,
        "forward",
        lambda model, batch: counts.append(len(batch.targets)) or forward(model, batch),
    )
    tiny.train(
        tmp_path / "run",
        init=str(tiny.model),
        val="",
        val_fraction=0.0,
        max_steps=1,
        batch_size=4,
        accumulate=3,
    )
    assert len(counts) == 3 and len(set(counts)) > 1


@pytest.mark.parametrize(
    "parts", ["projector", "projector,language_model", "vision_encoder", EVERYTHING]
)
def test_the_named_parts_move_and_the_others_keep_every_bit(tiny, tmp_path, parts):
    run = tiny.train(
        tmp_path / "run", init=str(tiny.model), train=parts, share=1, val="", val_fraction=0.0
    )
    trained = set(parts.split(","))
    for name, changed in moved(tiny.model, run / "model").items():
        assert changed == (name.split(".")[0] in trained), name
    assert {
        name.split(".")[0] for name in tensors(run / "checkpoints" / "step_4" / "model.safetensors")
    } == trained


def test_clipping_bounds_the_norm_and_the_log_tells_the_norm_before_it(tiny, tmp_path, watch):
    norms = []
    watch(
        lambda model: norms.append(
            math.sqrt(
                sum(
                    float(parameter.grad.square().sum())
                    for parameter in model.parameters()
                    if parameter.grad is not None
                )
            )
        )
    )
    run = tiny.train(tmp_path / "run", init=str(tiny.model), train=EVERYTHING, clip=0.01)
    assert norms == pytest.approx([0.01] * 4, rel=1e-3)
    assert all(line["grad_norm"] > 0.1 for line in metrics(run))


@pytest.mark.parametrize(("workers", "presses"), [(0, [0, 4]), (2, [2])])
def test_an_interrupted_run_continues_to_the_same_bits(
    tiny, tmp_path, monkeypatch, capsys, workers, presses
):
    # 14 of 60 records a step: batches straddle epochs, and runs stop between two log lines.
    settings = dict(
        init=str(tiny.model),
        train=EVERYTHING,
        batch_size=7,
        accumulate=2,
        max_steps=7,
        log_every=2,
        val_every=3,
        weight_decay=0.1,
    )
    whole = tiny.train(tmp_path / "whole", **settings)
    for resumed, step in enumerate(presses):
        with monkeypatch.context() as patch:
            interrupt_at(patch, step)
            with pytest.raises(SystemExit):
                tiny.train(tmp_path / "stopped", **settings, workers=workers, resume=bool(resumed))
        assert f"stopped after step {step + 1} of 7" in (printed := capsys.readouterr().err)
        assert f"--resume --out {tmp_path / 'stopped'}" in printed
        assert (tmp_path / "stopped" / "curves.png").exists() and not (
            tmp_path / "stopped" / "model"
        ).exists()
    stopped = tiny.train(tmp_path / "stopped", **settings, workers=workers, resume=True)
    assert metrics(stopped) == metrics(whole)
    assert [line["step"] for line in metrics(whole)] == [2, 3, 4, 6, 7]
    for name in (
        "model/model.safetensors",
        "samples.jsonl",
        *(
            f"checkpoints/step_7/{kind}"
            for kind in ("model.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS")
        ),
    ):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name


def test_fp16_drops_a_step_that_overflows_and_its_factor_survives_an_interruption(
    tiny, tmp_path, monkeypatch, watch
):
    settings = dict(init=str(tiny.model), dtype="float16", max_steps=4)
    monkeypatch.setattr(
        loop.Precision,
        "scaled",
        lambda precision, loss: (
            loss
            * precision.scaler.scale
            * (math.inf if loss_number.append(0) or len(loss_number) == 2 else 1)
        ),
    )
    taken, loss_number = [], []
    watch(lambda model: taken.append(0))
    run = tiny.train(tmp_path / "run", **settings)
    assert len(taken) == 3
    lines = metrics(run)
    assert lines[1]["grad_norm"] is None and all(math.isfinite(line["loss"]) for line in lines)
    state = json.loads((run / "checkpoints" / "step_4" / "state.json").read_text())
    assert state["scaler"] == {"scale": 2.0**15, "growth_interval": 1000, "good_steps": 2}

    loss_number.clear()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt_at(patch, 2)
        tiny.train(tmp_path / "stopped", **settings)
    stopped = tiny.train(tmp_path / "stopped", **settings, resume=True)
    assert metrics(stopped) == lines
    assert json.loads((stopped / "checkpoints" / "step_4" / "state.json").read_text()) == state


def break_calls(monkeypatch, what: str, broken) -> None:
    """Make the loss, or its gradient, of some forward passes (by number, from 1) not a number."""
    forward, calls = VisionLanguageModel.forward, []

    def pass_on(model, batch):
        loss = forward(model, batch)
        calls.append(0)
        if loss.requires_grad and broken(len(calls)) and what == "loss":
            return loss * math.nan
        if loss.requires_grad and broken(len(calls)):
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    monkeypatch.setattr(VisionLanguageModel, "forward", pass_on)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("log_every", [1, 3])
def test_a_step_that_is_not_finite_changes_nothing_and_names_its_records(
    tiny, tmp_path, monkeypatch, what, log_every
):
    settings = dict(
        init=str(tiny.model),
        train="projector,language_model",
        save_every=1,
        keep=9,
        log_every=log_every,
        weight_decay=0.5,
        max_steps=5,
        batch_size=3,
    )
    with monkeypatch.context() as patch:
        break_calls(patch, what, lambda call: call == 3)
        run = tiny.train(tmp_path / "run", **settings)
    weights = [
        tensors(run / "checkpoints" / f"step_{step}" / "model.safetensors") for step in (1, 2, 3, 4)
    ]
    same = [
        all(torch.equal(one[name], two[name]) for name in one)
        for one, two in itertools.pairwise(weights)
    ]
    assert same == [False, True, False]
    (bad,) = [json.loads(line) for line in (run / "bad_steps.jsonl").read_text().splitlines()]
    assert (
        bad["step"] == 3
        and len(bad["records"]) == 3
        and all("train.jsonl:" in where for where in bad["records"])
    )
    assert (bad["loss"] == "nan") == (what == "loss") and bad["grad_norm"] in ("nan", "inf")
    lines = {line["step"]: line for line in metrics(run)}
    assert lines[3]["grad_norm"] is None and math.isfinite(lines[5]["grad_norm"])
    assert (lines[3]["loss"] is None) if log_every == 1 else math.isfinite(lines[3]["loss"])
    assert (run / "curves.png").exists()


def test_too_many_bad_steps_in_a_row_stop_the_run_at_the_last_good_checkpoint(
    tiny, tmp_path, monkeypatch
):
    settings = dict(
        init=str(tiny.model),
        save_every=2,
        log_every=3,
        max_steps=20,
        max_bad_steps=4,
        val="",
        val_fraction=0.0,
    )
    with monkeypatch.context() as patch:
        break_calls(patch, "loss", lambda call: call == 2 or call > 4)
        with pytest.raises(
            NanoVLMError,
            match="the loss was not finite in 4 steps in a row, up to step 8; their records are in",
        ):
            tiny.train(tmp_path / "run", **settings)
    run = tmp_path / "run"
    assert [
        json.loads(line)["step"] for line in (run / "bad_steps.jsonl").read_text().splitlines()
    ] == [2, 5, 6, 7, 8]
    last = tensors(run / "checkpoints" / "step_6" / "model.safetensors")
    good = tensors(run / "checkpoints" / "step_4" / "model.safetensors")
    assert all(torch.equal(last[name], good[name]) for name in last)
    tiny.train(run, **settings, resume=True)
    assert [
        json.loads(line)["step"] for line in (run / "bad_steps.jsonl").read_text().splitlines()
    ] == [2, 5, 6]
    assert metrics(run)[-1]["step"] == 20


@pytest.mark.parametrize("policy", ["stop", "go-on"])
def test_a_full_disk_stops_the_run_or_not_as_asked(tiny, tmp_path, monkeypatch, capsys, policy):
    save_file, saved = checkpoint.save_file, []

    def full(*arguments):
        if saved.append(0) or len(saved) == 3:  # the second checkpoint's first file
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", full)
    settings = dict(
        init=str(tiny.model), save_every=1, max_steps=3, full_disk=policy, val="", val_fraction=0.0
    )
    if policy == "go-on":
        run = tiny.train(tmp_path / "run", **settings)
        assert [folder.name for folder in checkpoint.list_checkpoints(run)] == ["step_1", "step_3"]
        assert (
            "step_2: no room" in (printed := capsys.readouterr().err)
            and "training goes on" in printed
        )
        return
    with pytest.raises(
        NanoVLMError,
        match="step_2: no room for this checkpoint, .* step_1 stays and --resume goes on from it",
    ):
        tiny.train(tmp_path / "run", **settings)
    monkeypatch.undo()
    tiny.train(tmp_path / "run", **settings, resume=True)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]


def test_the_best_checkpoint_is_saved_when_it_is_found_and_kept(tiny, tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.5, 4.0])
    monkeypatch.setattr(loop, "validate", lambda *_: {"val_loss": next(losses)})
    run = tiny.train(
        tmp_path / "run", init=str(tiny.model), max_steps=10, val_every=2, save_every=100, keep=1
    )
    assert [folder.name for folder in checkpoint.list_checkpoints(run)] == ["step_4", "step_10"]


def test_a_validation_that_is_not_a_number_is_never_the_best(tiny, tmp_path, monkeypatch):
    losses = iter([None, 0.5, 2.0, None, 1.9])
    monkeypatch.setattr(loop, "validate", lambda *_: {"val_loss": next(losses)})
    run = tiny.train(
        tmp_path / "run", init=str(tiny.model), max_steps=10, val_every=2, save_every=100, keep=1
    )
    assert [folder.name for folder in checkpoint.list_checkpoints(run)] == ["step_4", "step_10"]


def test_random_numbers_of_a_step_do_not_depend_on_what_came_before(tiny, tmp_path, monkeypatch):
    settings = dict(
        init=str(tiny.model),
        train="projector,language_model",
        lora_rank=2,
        lora_dropout=0.5,
        max_steps=4,
        dtype="bfloat16",
    )
    whole = tiny.train(tmp_path / "whole", **settings)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt_at(patch, 1)
        tiny.train(tmp_path / "stopped", **settings)
    torch.randn(7)
    stopped = tiny.train(tmp_path / "stopped", **settings, resume=True)
    assert metrics(stopped) == metrics(whole)
    assert (stopped / "adapter/adapter.safetensors").read_bytes() == (
        whole / "adapter/adapter.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("changes", [{"batch_size": 2}, {"accumulate": 2}, {"data": "fewer"}])
def test_a_run_does_not_go_on_with_other_batches_or_data(tiny, tmp_path, monkeypatch, changes):
    settings = dict(init=str(tiny.model), batch_size=4, max_steps=4)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt_at(patch, 1)
        tiny.train(tmp_path / "run", **settings)
    if "data" in changes:
        lines = (tiny.data / "train.jsonl").read_text().splitlines()[:-1]
        (tmp_path / "fewer.jsonl").write_text("\n".join(lines))
        changes = {"data": str(tmp_path / "fewer.jsonl"), "images": str(tiny.data)}
    with pytest.raises(NanoVLMError, match=r"other data or settings: records .* \(was "):
        tiny.train(tmp_path / "run", **settings | changes, resume=True)
    tiny.train(tmp_path / "run", **settings | changes, resume=True, allow_changes=True)


def test_a_run_does_not_go_on_with_settings_that_its_checkpoint_did_not_have(
    tiny, tmp_path, monkeypatch
):
    settings = dict(init=str(tiny.model), max_steps=4)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt_at(patch, 1)
        tiny.train(tmp_path / "run", **settings)
    changed = settings | {"lr": 0.5, "system": "x" * 999}  # in a file that was edited or damaged
    with pytest.raises(
        NanoVLMError, match=r"other data or settings: .*--lr 0.5 \(was 0.001\)"
    ) as caught:
        tiny.train(tmp_path / "run", **changed, resume=True)
    assert "state.json: " in str(caught.value) and len(str(caught.value)) < 900
    tiny.train(tmp_path / "run", **changed, resume=True, allow_changes=True)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits_with_its_status(tiny, tmp_path, monkeypatch, number, status):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        interrupt_at(patch, 1, number)
        tiny.train(tmp_path / "run", init=str(tiny.model))
    assert stopped.value.code == status
    assert [folder.name for folder in checkpoint.list_checkpoints(tmp_path / "run")] == ["step_2"]


@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_signal_ends_the_wait_for_data(tiny, tmp_path, monkeypatch, capsys, at):
    """It does not wait with it, which may take longer than a scheduler has patience."""
    settings = {"init": str(tiny.model), "max_steps": 4, "save_every": 2}
    expected = tiny.train(tmp_path / "expected", **settings)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        loader = Batches.loader

        def stalling(batches, first, last, *rest):
            loading = loader(batches, first, last, *rest)
            if batches.options.shuffle:  # not those for validation
                yield from itertools.islice(loading, at)
                signal.raise_signal(signal.SIGTERM)
                pytest.fail("goes on waiting")
            yield from loading

        patch.setattr(Batches, "loader", stalling)
        tiny.train(tmp_path / "run", **settings)
    assert stopped.value.code == 143
    names = [folder.name for folder in checkpoint.list_checkpoints(tmp_path / "run")]
    assert names[-1:] == ([f"step_{at}"] if at else [])
    assert f"stopped after step {at} of 4, all saved" in capsys.readouterr().err
    resumed = tiny.train(tmp_path / "run", **settings, resume=True)
    one, other = (run / "model/model.safetensors" for run in (expected, resumed))
    assert one.read_bytes() == other.read_bytes()


def test_a_run_stopped_before_its_first_checkpoint_starts_again(
    tiny, tmp_path, monkeypatch, capsys
):
    with (
        monkeypatch.context() as patch,
        pytest.raises(NanoVLMError, match="the loss was not finite in 1 steps in a row"),
    ):
        patch.setattr(
            VisionLanguageModel, "forward", lambda model, batch: batch.pixels.sum() * math.nan
        )
        tiny.train(tmp_path / "run", init=str(tiny.model), max_bad_steps=1)
    run = tiny.train(tmp_path / "run", init=str(tiny.model), max_bad_steps=1, resume=True)
    assert "stopped before its first checkpoint" in capsys.readouterr().err
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]


def test_text_without_images_passes_through_a_stage_that_cannot_learn_from_it(tiny, tmp_path):
    answer = {"role": "assistant", "content": "你好。"}
    records = [{"messages": [{"role": "user", "content": "你好"}, answer]}] * 4
    image = str(tiny.data / "images/train/000000.png")
    records.append({"image": image, "messages": [{"role": "user", "content": "<image>"}, answer]})
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run = tiny.train(
        tmp_path / "run",
        init=str(tiny.model),
        data=str(tmp_path / "text.jsonl"),
        val="",
        val_fraction=0.0,
        batch_size=1,
        max_steps=5,
    )
    assert sorted(line["grad_norm"] > 0 for line in metrics(run)) == [False] * 4 + [True]
