"""Short runs, and their predicted memory, with settings that may surprise."""

import dataclasses
from pathlib import Path
from random import Random
from typing import Any

from nanovlm.training.settings import Settings
from tests.fuzz.commands.flags import read
from tests.fuzz.commands.toy import FLAGS, arguments_of, scenes
from tests.fuzz.damage import NUMBERS, TEXTS
from tests.fuzz.inputs import FaultError, Input, Kind

# Compiling takes minutes, services are not installed, and where a run is written is another kind.
LEFT_OUT = {"compile", "track", "device", "parallel", "out", "resume", "allow_changes", "data"}
# A large number of these is obeyed, and takes as long; a fast run takes a small one.
OBEYED = {"max_steps", "accumulate", "epochs", "val_samples", "keep"}
WORDS = {
    "train": ("projector", "vision_encoder", "language_model", "language_model,projector", ","),
    "lora_targets": ("*_proj", "q_proj,v_proj", "(", "*", "[", "lm_head"),
    "projector": ("linear", "mlp", "pixel_shuffle", "bilinear", "resampler"),
    "quantize": ("nf4", "int8"),
    "objective": ("dpo", "words"),
    "optimizer": ("adamw8bit",),
    "dtype": ("bfloat16", "float16"),
    "full_disk": ("go-on",),
    "val": ("s/train.jsonl", "missing"),
    "images": ("s", "missing"),
}  # fmt: skip


def make(rng: Random) -> Input:
    """A run with one to three other settings."""
    flags = dict(FLAGS)
    switches = []
    fields = [field for field in dataclasses.fields(Settings) if field.name not in LEFT_OUT]
    for field in rng.sample(fields, rng.choice((1, 1, 2, 3))):
        name = field.name.replace("_", "-")
        if field.type is bool:
            switches.append(rng.choice((f"--{name}", f"--no-{name}")))
        else:
            flags[name] = str(_value(rng, field))
    command = rng.choice(("train_stage2",) * 5 + ("nanovlm.memory.__main__",))
    if command.startswith("nanovlm"):
        switches += ["--stage", "2"]
    given = (text.replace("\0", "") for text in arguments_of(flags) + switches)
    arguments = (text.encode("utf-8", "replace").decode() for text in given)
    return Input(dict(scenes()), (command, *arguments))


def _value(rng: Random, field: dataclasses.Field[Any]) -> Any:
    if field.type is str:
        return rng.choice(WORDS.get(field.name, TEXTS) if rng.random() < 0.7 else TEXTS)
    numbers = [each for each in NUMBERS if field.name not in OBEYED or not each > 9]
    whole = [each for each in numbers if isinstance(each, int)]
    return rng.choice(numbers if field.type is float or rng.random() < 0.1 else whole)


def check(input: Input, folder: Path, was_read: bool) -> None:
    """The data are as they were; a model is there if the run has come to its end."""
    if changed := input.changed(folder):
        raise FaultError(f"changed {', '.join(changed)}")
    is_run = input.arguments[0].startswith("train")
    if (folder / "run" / "model").exists() != (was_read and is_run):
        raise FaultError("a model is left after a refusal, or none after a run")


KIND = Kind("training", make, read, short=2, long=200, check=check)
