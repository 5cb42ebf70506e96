"""A toy world and a run on it, which several kinds of inputs begin with."""

import contextlib
import io
import sys
import tempfile
from functools import cache
from pathlib import Path
from unittest import mock

from data_tools import make_preferences
from data_tools.make_scenes import make_scenes
from nanovlm.hub.toy import ASSETS
from nanovlm.training.presets import load_settings
from nanovlm.training.run import run_stage

SHIPPED = str(ASSETS / "tiny-vlm")
SCENE = (ASSETS / "scene.png").read_bytes()
STEPS = 3
# A short run of the projector of the shipped model.
FLAGS = {
    "init": SHIPPED, "data": "s/train.jsonl", "val": "", "val-fraction": "0", "train": "projector",
    "batch-size": "2", "max-steps": str(STEPS), "save-every": "1", "log-every": "1",
    "device": "cpu", "dtype": "float32", "workers": "0", "out": "run",
}  # fmt: skip
RUNS = {
    "plain": {},
    "validated": {"val": "s/train.jsonl", "val-samples": "2", "val-every": "1"},
    "preferences": {"objective": "dpo", "data": "s/pairs.jsonl"},
}


def arguments_of(flags: dict[str, str]) -> list[str]:
    """The arguments of a training script."""
    given = [part for name, value in flags.items() for part in (f"--{name}", value)]
    return ["--no-cache-features", *given]


@cache
def scenes() -> dict[str, bytes]:
    """The files of six scenes to train on, in the folder s, and pairs of answers about them."""
    with _in_an_empty_folder():
        make_scenes("s", scenes=6, eval_scenes=1, workers=1)
        pairs = ["pairs", "--data", "s/train.jsonl", "--out", "s/pairs.jsonl"]
        with mock.patch.object(sys, "argv", pairs):
            make_preferences.main()
        files = _files_of(Path("s"))
    evaluated = ("s/val.jsonl", "s/novel.jsonl", "s/images/val/", "s/images/novel/")
    return {name: data for name, data in files.items() if not name.startswith(evaluated)}


@cache
def stopped_run(what: str) -> dict[str, bytes]:
    """The files of a run of RUNS that was stopped before its last step, and of its data."""
    with _in_an_empty_folder():
        for name, data in scenes().items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_bytes(data)
        run_stage(load_settings("stage2", arguments_of(FLAGS | RUNS[what])))
        files = _files_of(Path("run"))
    later = ("run/model/", f"run/checkpoints/step_{STEPS}/", "run/curves.png", "run/samples.png")
    return scenes() | {name: data for name, data in files.items() if not name.startswith(later)}


@contextlib.contextmanager
def _in_an_empty_folder():
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        yield


def _files_of(folder: Path) -> dict[str, bytes]:
    return {path.as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
