"""--track: no import unasked, everything arrives, no service stops a run (with stand-ins)."""

import json
import re
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

from nanovlm.errors import NanoVLMError
from nanovlm.training.monitor.tracking import MODULES, build_tracker

LINE = {"step": 10, "loss": 1.5, "lr": 1e-3, "grad_norm": None, "val_loss": 2.5, "samples": 40}


def service(name: str) -> tuple[types.ModuleType, list]:
    """A stand-in for one of the packages and the list of its calls."""
    calls: list = []
    module = types.ModuleType(MODULES[name])

    def note(kind):
        return lambda *arguments, **options: calls.append((kind, arguments, options))

    if name == "tensorboard":

        def writer(folder, **options):
            calls.append(("init", (folder,), options))
            return types.SimpleNamespace(
                add_scalar=note("scalar"), add_image=note("image"), close=note("close")
            )

        module.SummaryWriter = writer
    else:

        def init(**options):
            calls.append(("init", (), options))
            return types.SimpleNamespace(log=note("log"), finish=note("close"))

        module.init, module.log, module.finish = init, note("log"), note("close")
        module.Image = lambda path: ("image", path)
    return module, calls


@pytest.fixture
def fake(monkeypatch):
    """Put a stand-in where the package would be found; returns the list of its calls."""

    def install(name: str) -> list:
        module, calls = service(name)
        monkeypatch.setitem(sys.modules, MODULES[name], module)
        return calls

    return install


def figure(folder: Path) -> Path:
    Image.new("RGB", (3, 2), "red").save(folder / "samples.png")
    return folder / "samples.png"


@pytest.mark.parametrize("name", MODULES)
def test_numbers_and_figures_arrive_with_their_step(fake, tmp_path, name):
    calls = fake(name)
    tracker = build_tracker(name, tmp_path, {"track": name})
    assert not calls  # a run that cannot start leaves no experiment behind
    tracker.start(0)
    tracker.log(LINE)
    tracker.image("samples", tmp_path / "nothing.png", 10)
    tracker.image("samples", figure(tmp_path), 10)
    tracker.close()
    assert calls[0][0] == "init" and calls[-1][0] == "close"
    numbers = {"loss": 1.5, "lr": 1e-3, "val_loss": 2.5, "samples": 40}
    if name == "tensorboard":
        assert {
            key: value
            for kind, (key, value, step), _ in calls[1:-2]
            if kind == "scalar" and step == 10
        } == numbers
        kind, (label, pixels, step), options = calls[-2]
        assert (kind, label, pixels.shape, step, options) == (
            "image",
            "samples",
            (2, 3, 3),
            10,
            {"dataformats": "HWC"},
        )
    else:
        assert calls[1:-1] == [
            ("log", (numbers,), {"step": 10}),
            ("log", ({"samples": ("image", str(tmp_path / "samples.png"))},), {"step": 10}),
        ]


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_resumed_run_goes_on_under_its_id(fake, tmp_path, name):
    calls = fake(name)
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    for run, resume in (("first", False), ("first", True), ("second", False)):
        build_tracker(name, tmp_path / run, {"track": name, "resume": resume}).start(
            20 if resume else 0
        )
    first, again, second = (options for _, _, options in calls)
    assert first["id"] == again["id"] != second["id"] and re.fullmatch("[a-z0-9]{21}", first["id"])
    assert first == again and first["resume"] == "allow" and first["config"]["track"] == name
    assert "mode" not in first  # that is for the user's environment to say
    assert (first.get("name") or first["experiment_name"]) == "first"


def test_tensorboard_hides_the_steps_that_are_taken_again(fake, tmp_path):
    calls = fake("tensorboard")
    for step in (0, 20):
        build_tracker("tensorboard", tmp_path, {}).start(step)
    assert [(arguments, options) for _, arguments, options in calls] == [
        ((str(tmp_path / "tensorboard"),), {"purge_step": None}),
        ((str(tmp_path / "tensorboard"),), {"purge_step": 21}),
    ]


@pytest.mark.parametrize("name", MODULES)
def test_a_missing_package_is_one_line_before_anything_is_read(tiny, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, MODULES[name], None)  # as if it were not installed
    with pytest.raises(
        NanoVLMError, match=rf"--track {name}: .*python -m pip install {name}"
    ) as raised:
        tiny.train(tmp_path / "run", track=name, data="nowhere.jsonl")
    assert "\n" not in str(raised.value) and not (tmp_path / "run").exists()


def test_nothing_is_imported_unasked(tiny, tmp_path, monkeypatch):
    for module in MODULES.values():
        monkeypatch.setitem(sys.modules, module, None)  # whoever imports it fails
    tiny.train(tmp_path / "run", max_steps=1)


@pytest.mark.parametrize("method", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_reported_once_and_changes_nothing(
    tiny, tmp_path, fake, monkeypatch, capsys, method
):
    calls, module = fake("swanlab"), sys.modules["swanlab"]

    def broken(*_, **__):
        calls.append(("broken", (), {}))
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(module, method, broken)
    run = tiny.train(tmp_path / "run", track="swanlab")
    printed = capsys.readouterr().err
    assert printed.count("--track swanlab failed (ConnectionError: no route to host)") == 1
    assert [kind for kind, *_ in calls].count("broken") == 1 and calls[-1][
        0
    ] == "broken"  # and is not called again
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4 and (run / "model").exists()


def test_a_run_tracks_what_it_logs_and_closes_when_it_breaks(tiny, tmp_path, fake, monkeypatch):
    calls = fake("wandb")
    run = tiny.train(tmp_path / "run", track="wandb", val_every=2)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [
        (options["step"], arguments[0]) for kind, arguments, options in calls if kind == "log"
    ]
    assert [step for step, numbers in logged if "loss" in numbers] == [1, 2, 3, 4]
    assert [step for step, numbers in logged if "samples" in numbers and "loss" not in numbers] == [
        2,
        4,
    ]
    assert [numbers["val_perplexity"] for _, numbers in logged if "val_loss" in numbers] == [
        line["val_perplexity"] for line in lines if "val_loss" in line
    ]
    calls.clear()
    monkeypatch.setattr("nanovlm.training.loop.schedule", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiny.train(tmp_path / "broken", track="wandb")
    assert [kind for kind, *_ in calls] == ["init", "close"]
