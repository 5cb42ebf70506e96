"""Several processes, started with torchrun: the same curves, one that writes, none that hangs."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from nanovlm.errors import NanoVLMError
from nanovlm.hub.loading import open_checkpoint
from nanovlm.hub.shapes import LANGUAGE_MODELS
from nanovlm.training.distributed import parallel
from nanovlm.training.distributed.parallel import Parallel, build_parallel
from nanovlm.training.distributed.shares import gather, local, scatter, total
from nanovlm.training.presets import load_settings
from nanovlm.training.run import run_stage
from nanovlm.training.settings import Settings
from tests.runs import metrics

EVERYTHING = "projector,language_model,vision_encoder"
KINDS = ("ddp", "fsdp")


def tensors(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(path)
    return {
        name: checkpoint.tensor(name)
        for name in checkpoint.keys()
        if not name.startswith("random/")
    }


def check_same_curve(run: Path, expected: Path) -> None:
    """Every line as in the run of one process; prints the largest difference of a loss (-rP).

    It is taken relative to losses above 1: that of words is a sum over all words, near 100.
    """
    largest = 0.0
    for line, other in zip(metrics(run), metrics(expected), strict=True):
        assert line.keys() == other.keys() and all(
            line[key] == other[key] for key in ("step", "samples", "lr")
        )
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], abs=1e-4)
        for key in ("loss", "val_loss"):
            if key in line:
                difference = abs(line[key] - other[key]) / max(1.0, other[key])
                largest = max(largest, difference)
    print(f"{run.name}: losses differ from those of {expected.name} by {largest:.1e} at most")
    assert len(metrics(expected)) > 3 and largest < 1e-6


@pytest.fixture(scope="module")
def mixed(tiny, tmp_path_factory) -> Path:
    """Records of very different lengths, few with an image, so that many steps have none."""
    shown = (tiny.data / "train.jsonl").read_text().splitlines()
    spoken = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": "你好" * length},
                    {"role": "assistant", "content": "你好。" * length},
                ]
            }
        )
        for length in (1, 40)
    ]
    path = tmp_path_factory.mktemp("mixed") / "train.jsonl"
    path.write_text(
        "\n".join(shown[number] if number % 12 == 0 else spoken[number % 2] for number in range(48))
        + "\n"
    )
    return path


@pytest.fixture(scope="module")
def world(tiny, mixed, tmp_path_factory):
    """Runs by name, and a way to start them: alone, or with `torchrun`."""
    folder = tmp_path_factory.mktemp("world")

    class World:
        @staticmethod
        def settings(name: str, processes: int = 1, **changes) -> dict:
            chosen = {
                "plain": {"batch_size": 8 // processes},
                "mixed": {
                    "batch_size": 4 // processes,
                    "accumulate": 2,
                    "data": str(mixed),
                    "images": str(tiny.data),
                    "val": "",
                    "val_fraction": 0.0,
                    "weight_decay": 0.1,
                },
                "words": {
                    "batch_size": 4 // processes,
                    "objective": "words",
                    "train": "projector",
                    "word_images": 2,
                },
            }
            return dataclasses.asdict(
                tiny.settings(
                    folder / name,
                    **{
                        "init": str(tiny.model),
                        "train": EVERYTHING,
                        "max_steps": 6,
                        "val_every": 3,
                        "save_every": 2,
                        "keep": 9,
                        **chosen[name.split("-")[0]],
                        **changes,
                    },
                )
            )

        @staticmethod
        def experts(kind: str) -> dict:
            """A mixture of experts from scratch, with a load-balance loss that weighs a lot."""
            shape = folder / "shape"
            shape.mkdir(exist_ok=True)
            config = {**LANGUAGE_MODELS["svlm"].config, "balance_loss": 10.0}
            (shape / "config.json").write_text(json.dumps(config))
            preset = load_settings("stage1", ["--preset", "svlm", "--tiny"])
            changes = {
                "language_model_shape": str(shape),
                "data": str(tiny.data / "train.jsonl"),
                "val": "",
                "val_fraction": 0.0,
                "train": "projector,language_model",
                "language_model_layers": 0,
                "batch_size": 2,
                "accumulate": 1,
                "max_steps": 3,
                "log_every": 1,
                "device": "cpu",
                "dtype": "float32",
                "parallel": kind,
                "out": str(folder / f"experts-{kind}2"),
            }
            return dataclasses.asdict(dataclasses.replace(preset, **changes))

        @staticmethod
        def torchrun(processes: int, *runs: dict, **harm) -> subprocess.CompletedProcess:
            script = Path(__file__).parent / "torchrun_runs.py"
            return subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    "--nproc_per_node",
                    str(processes),
                    str(script),
                    json.dumps(runs),
                    json.dumps(harm),
                ],
                check=False,
                capture_output=True,
                text=True,
                timeout=240,
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(script.parents[3]), "OMP_NUM_THREADS": "1"},
            )

        @staticmethod
        def copy(name: str, new: str, step: int) -> None:
            """A run as it was when it had just saved that step."""
            shutil.copytree(folder / name, folder / new)
            shutil.rmtree(folder / new / "model")
            for checkpoint in (folder / new / "checkpoints").iterdir():
                if int(checkpoint.name.removeprefix("step_")) > step:
                    shutil.rmtree(checkpoint)

    World.folder = folder
    for name in ("plain-1", "mixed-1", "words-1"):
        run_stage(Settings(**World.settings(name)))
    return World


@pytest.fixture(scope="module")
def by_two(world):
    """All kinds of runs with two processes, in one start."""
    runs = [
        world.settings(f"{data}-{kind}2", 2, parallel=kind)
        for data in ("plain", "mixed")
        for kind in KINDS
    ]
    runs += [world.settings("words-ddp2", 2)]
    runs += [world.experts(kind) for kind in KINDS]
    done = world.torchrun(2, *runs)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", ["plain", "mixed"])
def test_two_processes_draw_the_curve_of_one(world, by_two, data, kind):
    run, alone = world.folder / f"{data}-{kind}2", world.folder / f"{data}-1"
    check_same_curve(run, alone)
    for step in (2, 6):
        for file, tolerance in (("model", 1e-4), ("optimizer", 1e-5)):
            saved, expected = (
                tensors(folder / "checkpoints" / f"step_{step}" / f"{file}.safetensors")
                for folder in (run, alone)
            )
            assert saved.keys() == expected.keys()
            for name, tensor in expected.items():
                assert saved[name].dtype == tensor.dtype
                if "k_proj.bias" not in name:  # has no gradient but rounding, which Adam enlarges
                    torch.testing.assert_close(
                        saved[name], tensor, atol=tolerance, rtol=0, msg=name
                    )
    final, expected = (tensors(folder / "model" / "model.safetensors") for folder in (run, alone))
    assert final.keys() == expected.keys() and (data == "mixed" or (run / "samples.png").exists())
    for name, tensor in expected.items():
        if "k_proj.bias" not in name:
            torch.testing.assert_close(final[name], tensor, atol=1e-4, rtol=0, msg=name)


def test_two_processes_learn_the_words_of_one(world, by_two):
    run, alone = world.folder / "words-ddp2", world.folder / "words-1"
    check_same_curve(run, alone)
    final, expected = (tensors(folder / "model" / "model.safetensors") for folder in (run, alone))
    for name, tensor in expected.items():
        torch.testing.assert_close(final[name], tensor, atol=1e-5, rtol=0, msg=name)


def test_a_step_without_an_image_leaves_the_vision_encoder_unchanged(world, by_two):
    """Else the comparison above would not show that a parameter without any gradient keeps none."""
    last = tensors(world.folder / "mixed-1" / "checkpoints" / "step_6" / "optimizer.safetensors")
    steps = {
        name.split(".")[0]: int(tensor) for name, tensor in last.items() if name.startswith("step/")
    }
    assert (
        0
        < steps["step/projector"]
        == steps["step/vision_encoder"]
        < steps["step/language_model"]
        == 6
    )


def test_experts_and_their_balance_loss_are_the_same_sharded_and_replicated(world, by_two):
    """The balance loss leaves a block beside its output, and a router's gradient depends on it."""
    ddp, fsdp = (world.folder / f"experts-{kind}2" for kind in KINDS)
    for ours, theirs in zip(metrics(fsdp), metrics(ddp), strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-6)
    file = "checkpoints/step_3/model.safetensors"
    expected = tensors(ddp / file)
    routers = [name for name in expected if ".router." in name]
    assert len(routers) == 4
    for name in routers:
        torch.testing.assert_close(tensors(fsdp / file)[name], expected[name], atol=1e-6, rtol=0)


def test_one_process_talks(by_two):
    assert by_two.stdout == ""
    for said in (
        "records to train on",
        "device cpu, float32, 2 processes, fsdp",
        "the model is in",
    ):
        assert by_two.stderr.count(said) == (3 if "fsdp" in said else 7)
    assert "(rank 1)" not in by_two.stderr


def test_an_error_of_one_process_ends_all_with_its_line(world):
    done = world.torchrun(2, world.settings("plain-error", 2), how="error", rank=1, step=2)
    assert done.returncode != 0
    assert done.stderr.count("error (rank 1): this process has had enough") == 1
    assert "nanovlm/training" not in done.stderr  # no traceback of ours; torchrun's own summary is


@pytest.mark.slow
def test_an_error_of_all_is_said_once(world):
    done = world.torchrun(2, world.settings("plain-nowhere", 2, data="nowhere.jsonl"))
    assert (
        done.returncode != 0
        and done.stderr.count("nowhere.jsonl: cannot be read") == 1
        and "error (rank 0)" in done.stderr
    )


@pytest.mark.slow
def test_a_killed_process_ends_the_others_within_seconds(world):
    started = time.monotonic()
    done = world.torchrun(2, world.settings("plain-killed", 2), how="kill", rank=1, step=2)
    assert done.returncode != 0 and time.monotonic() - started < 120
    assert "SIGKILL" in done.stderr and "nanovlm/training" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_process_stops_all_after_the_same_step(world, by_two, kind):
    settings = world.settings(f"plain-{kind}-stopped", 2, parallel=kind)
    done = world.torchrun(2, settings, how="interrupt", rank=1, step=2)
    assert (
        done.returncode != 0
        and done.stderr.count("stopped after step 3 of 6") == 1
        and "nanovlm/training" not in done.stderr
    )
    assert "torchrun --nproc_per_node 2 torchrun_runs.py --resume" in done.stderr
    resumed = world.torchrun(2, settings | {"resume": True})
    assert resumed.returncode == 0, resumed.stderr
    assert metrics(world.folder / f"plain-{kind}-stopped") == metrics(
        world.folder / f"plain-{kind}2"
    )  # the same bits


@pytest.mark.parametrize("kind", KINDS)
def test_what_two_processes_saved_one_goes_on_with(world, by_two, kind):
    world.copy(f"mixed-{kind}2", f"mixed-{kind}2-by1", step=2)
    run_stage(Settings(**world.settings(f"mixed-{kind}2-by1", resume=True)))
    check_same_curve(world.folder / f"mixed-{kind}2-by1", world.folder / "mixed-1")


@pytest.mark.slow
def test_four_processes_draw_the_curve_of_one_and_go_on_with_what_others_saved(world, by_two):
    runs = [world.settings(f"plain-{kind}4", 4, parallel=kind) for kind in KINDS]
    for before in ("plain-1", "plain-ddp2", "plain-fsdp2"):
        for kind in KINDS:
            world.copy(before, f"{before}-by-{kind}4", step=2)
            runs.append(world.settings(f"{before}-by-{kind}4", 4, parallel=kind, resume=True))
    done = world.torchrun(4, *runs)
    assert done.returncode == 0, done.stderr
    for settings in runs:
        check_same_curve(Path(settings["out"]), world.folder / "plain-1")


def test_a_world_of_one_starts_nothing():
    alone = Parallel(torch.device("cpu"), sharded=True)
    assert not torch.distributed.is_initialized() and (alone.rank, alone.world) == (0, 1)
    assert total(3, 0.5) == [3, 0.5] and alone.largest(2) == 2 and alone.all_lines(["a"]) == ["a"]
    drawn = [torch.rand(4) for step in (5, 5, 6) if alone.seed(step) is None]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    weight = nn.Parameter(torch.ones(3))
    alone.reduce_gradients([weight])
    assert weight.grad is None and gather(weight) is weight and local(weight) is weight


@pytest.mark.parametrize(
    ("device", "changes", "expected"),
    [
        ("mps", {}, "cannot share mps; .* --device cpu"),
        ("cpu", {"parallel": "fsdp", "optimizer": "adamw8bit"}, "take --optimizer adamw"),
    ],
)
def test_what_several_processes_cannot_do_is_refused_before_they_meet(
    monkeypatch, device, changes, expected
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(NanoVLMError, match=expected):
        build_parallel(Settings(**changes), torch.device(device))


def test_a_copy_of_a_tensor_that_is_not_shared_is_whole():
    full = torch.arange(3.0)
    copy = scatter(full, like=torch.zeros(3))
    assert torch.equal(copy, full) and copy.data_ptr() != full.data_ptr()


def test_buckets_hold_all_gradients_in_order_and_as_many_as_fit(monkeypatch):
    monkeypatch.setattr(parallel, "BUCKET", 10)
    gradients = [torch.zeros(size) for size in (4, 6, 1, 30, 2, 3)]
    assert [[len(gradient) for gradient in bucket] for bucket in parallel._buckets(gradients)] == [
        [4, 6],
        [1],
        [30],
        [2, 3],
    ]
