"""kill -9 at any moment: the run resumes from the disk to the bits of one that was not killed."""

import multiprocessing
import random
import time

import pytest

from nanovlm.training.monitor.log import RunLog
from nanovlm.training.run import run_stage
from nanovlm.training.settings import Settings
from tests.runs import metrics

RESULTS = (
    "model/model.safetensors",
    "checkpoints/step_12/model.safetensors",
    "checkpoints/step_12/optimizer.safetensors",
    "checkpoints/step_12/state.json",
    "checkpoints/step_12/SHA256SUMS",
)


def _train(settings: Settings) -> None:
    import torch

    torch.set_num_threads(1)
    RunLog.draw = lambda log: None  # a third of so short a run
    run_stage(settings)


@pytest.mark.parametrize(
    ("dtype", "kills"),
    [
        ("float32", 4),
        *(pytest.param(dtype, 15, marks=pytest.mark.slow) for dtype in ("float32", "bfloat16")),
    ],
)
def test_killed_at_random_moments_and_resumed_it_ends_with_the_same_bits(
    tiny, tmp_path, dtype, kills
):
    # A server that has imported everything forks the runs, so that each starts within a moment.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["nanovlm.training.run"])

    def settings(name: str, **changes) -> Settings:
        return tiny.settings(
            tmp_path / name,
            init=str(tiny.model),
            train="projector,language_model",
            dtype=dtype,
            max_steps=12,
            save_every=1,
            keep=2,
            log_every=3,
            val="",
            val_fraction=0.0,
            **changes,
        )

    def start(chosen: Settings) -> multiprocessing.Process:
        process = processes.Process(target=_train, args=(chosen,))
        process.start()
        return process

    start(settings("first")).join()  # the server's own start is in this one
    began = time.perf_counter()
    whole = start(settings("whole"))
    whole.join()
    duration = time.perf_counter() - began
    assert whole.exitcode == 0

    moments, killed, finished = random.Random(dtype), 0, []
    while killed < kills or not finished:
        name = f"killed_{len(finished)}"
        process = start(settings(name, resume=(tmp_path / name / "settings.toml").exists()))
        process.join(timeout=duration * moments.uniform(0.05, 1.0) if killed < kills else None)
        if process.is_alive():
            process.kill()
            process.join()
            killed += 1
        else:
            assert process.exitcode == 0
        if (tmp_path / name / "model").exists():
            finished.append(tmp_path / name)
    for run in finished:
        assert metrics(run) == metrics(tmp_path / "whole")
        for result in RESULTS:
            assert (run / result).read_bytes() == (tmp_path / "whole" / result).read_bytes(), result
    print(
        f"{dtype}: {killed} kills, {len(finished)} runs ended with the bits of the one not killed"
    )
