"""Short training runs on the toy world, for recordings: the tiny preset's settings, fewer steps."""

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch

from data_tools.make_scenes import make_scenes
from nanovlm.data.records import Record, read_records
from nanovlm.evaluation.answers import answer_records, references_of
from nanovlm.evaluation.metrics import exact_match, same_items
from nanovlm.hub.models import load_model, save_model
from nanovlm.model.language_model import LanguageModel
from nanovlm.training.building import build_model
from nanovlm.training.presets import load_settings
from nanovlm.training.run import run_stage

SCENES = Path(__file__).resolve().parents[2] / "data" / "scenes"
BOTH = "projector,language_model"


def prepare_scenes() -> None:
    """Draw the toy world, unless it is there."""
    torch.set_num_threads(1)
    make_scenes(SCENES)


def stage(name: str, out: Path, steps: int, seed: int, **changes: Any) -> list[dict]:
    """Run a stage of the tiny preset for `steps` steps; returns the lines of its metrics.jsonl."""
    flags = {
        "data": SCENES / "train.jsonl",
        "val": SCENES / "val.jsonl",
        "out": out,
        "max_steps": steps,
        "seed": seed,
        "val_every": 25,
        "val_samples": 128,
        **changes,
    }
    arguments = []
    for key, value in flags.items():
        option = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(option if value else option.replace("--", "--no-", 1))
        else:
            arguments += [option, str(value)]
    run_stage(load_settings(name, arguments))
    text = (out / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def with_random_language_model(folder: Path, seed: int) -> Path:
    """The parts of the tiny preset, its language model's weights drawn anew, as a model folder."""
    torch.manual_seed(seed)
    model = build_model(load_settings("stage1", [])).float()
    model.language_model = LanguageModel(model.language_model.config)
    save_model(model, folder)
    return folder


def held_out(count: int) -> list[Record]:
    """The same `count` questions of the toy world's val, drawn with seed 0."""
    records, _ = read_records(SCENES / "val.jsonl")
    return random.Random(0).sample(records, count)


@torch.no_grad()
def outcomes(model: Path, records: list[Record], control: str = "none") -> list[bool]:
    """For each record, whether the model's answer is right."""
    answers = answer_records(load_model(model, torch.float32), records, control=control)
    right = []
    for record, answer in zip(records, answers):
        same = same_items if record.extra["kind"] == "describe" else exact_match
        right.append(same(answer, references_of(record)))
    return right


@torch.no_grad()
def change_of_language_model(model: Path) -> float:
    """How far training moved the language model's weights: ‖new − old‖ / ‖old‖."""
    new = load_model(model, torch.float32).language_model
    old = build_model(load_settings("stage1", [])).language_model.float()
    pairs = [(a - b, b) for a, b in zip(new.parameters(), old.parameters())]
    moved = sum(change.double().pow(2).sum() for change, _ in pairs)
    return float((moved / sum(before.double().pow(2).sum() for _, before in pairs)).sqrt())


def temporary_folder() -> tempfile.TemporaryDirectory:
    """A folder for runs, deleted afterwards."""
    return tempfile.TemporaryDirectory(prefix="lesson-")
