"""Run folders that were damaged between two steps, for --resume."""

import hashlib
import json
from pathlib import Path
from random import Random
from typing import Any

from nanovlm.training.presets import load_settings
from nanovlm.training.run import run_stage
from tests.fuzz.commands.toy import stopped_run
from tests.fuzz.damage import damaged_bytes, damaged_file, damaged_value, rewritten, to_json
from tests.fuzz.inputs import Content, FaultError, Input, Kind, Special

NAMES = ("model.safetensors", "optimizer.safetensors", "state.json")
# What else may lie in a folder of checkpoints, after a crash or by a person's hand.
STRANGE = (
    "step_2.bak", "step_", "step_x", "step_-1", "step_02", "step_99", "step_2 copy", "notes",
    ".step_4.tmp", "damaged_step_1", "step_9999999999999999999999",
)  # fmt: skip


def make(rng: Random) -> Input:
    """A stopped run in which one file is damaged, missing or strange."""
    kind = rng.choice(("plain", "plain", "plain", "validated", "preferences"))
    files: dict[str, Content] = dict(stopped_run(kind))
    files["run/bad_steps.jsonl"] = b'{"step": 1, "loss": "nan", "grad_norm": "1", "records": []}\n'
    what = rng.randrange(6)
    if what == 0:
        logs = [name for name in files if name.startswith("run/") and name.endswith(".jsonl")]
        name = rng.choice(logs)
        files[name] = _damaged_lines(rng, files[name])
    elif what == 1:
        text = files["run/settings.toml"]
        assert isinstance(text, bytes)
        files["run/settings.toml"] = rng.choice((damaged_bytes(rng, text), rewritten(rng, text)))
    elif what == 2:
        strange = rng.choice(STRANGE)
        if rng.random() < 0.5:
            files[f"run/checkpoints/{strange}"] = b"a"
        else:
            for name in (*NAMES, "SHA256SUMS"):
                files[f"run/checkpoints/{strange}/{name}"] = files[f"run/checkpoints/step_2/{name}"]
    elif what == 3:
        del files[rng.choice([name for name in files if name.startswith("run/")])]
    elif what == 4 and rng.random() < 0.3:
        writers = (b"", b"a", b"process 1 on a", b"process 999999999 on a", rng.randbytes(9))
        files["run/.lock"] = rng.choice((*writers, *Special))
    else:
        _damage_checkpoint(rng, files)
    return Input(files, (kind,))


def _damaged_lines(rng: Random, text: Content) -> Content:
    assert isinstance(text, bytes)

    def structured() -> bytes:
        lines = text.splitlines()
        number = rng.randrange(len(lines))
        value: Any = json.loads(lines[number])
        lines[number] = rng.choice(
            (to_json(damaged_value(rng, value)), damaged_bytes(rng, lines[number]))
        )
        return b"\n".join(lines) + rng.choice((b"\n", b""))

    return damaged_file(rng, text, structured)


def _damage_checkpoint(rng: Random, files: dict[str, Content]) -> None:
    """Another content of one file, mostly with the right digest."""
    folder = "run/checkpoints/step_2"
    name = rng.choice((*NAMES, "state.json", "state.json", "SHA256SUMS"))
    content = files[f"{folder}/{name}"]
    assert isinstance(content, bytes)

    def structured() -> bytes:
        if name == "state.json":
            return to_json(damaged_value(rng, json.loads(content)))
        if name == "SHA256SUMS":
            return damaged_bytes(rng, content)
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        text = to_json(damaged_value(rng, header))
        return len(text).to_bytes(8, "little") + text + content[8 + size :]

    files[f"{folder}/{name}"] = damaged_file(rng, content, structured)
    if name != "SHA256SUMS" and rng.random() < 0.8:
        contents = {each: files[f"{folder}/{each}"] for each in NAMES}
        files[f"{folder}/SHA256SUMS"] = "".join(
            f"{hashlib.sha256(data).hexdigest()}  {each}\n"
            for each, data in contents.items()
            if isinstance(data, bytes)
        ).encode()


def read(_: Input) -> None:
    """Go on with the run."""
    run_stage(load_settings("stage2", ["--out", "run", "--resume"]))


def check(input: Input, folder: Path, was_read: bool) -> None:
    """No weights of a checkpoint are gone, and the model is there if the run has ended well."""
    run, settings = folder / "run", "run/settings.toml"
    weights = [path for path in run.glob("checkpoints/*/model.safetensors") if path.is_file()]
    kept = {path.read_bytes() for path in weights}
    # Other settings may say that fewer are kept.
    if input.files.get(settings) == stopped_run(*input.arguments)[settings]:
        for name, content in input.files.items():
            is_weights = name.endswith("/model.safetensors") and "/." not in name
            if is_weights and isinstance(content, bytes) and content not in kept:
                raise FaultError("the weights of a checkpoint are gone")
    if (run / "model").exists() != was_read:
        raise FaultError("a model is left after a refusal, or none after a run")
    if was_read:
        lines = (run / "metrics.jsonl").read_bytes().decode().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        if steps != sorted(set(steps)):
            raise FaultError("the steps of metrics.jsonl are not in order")


KIND = Kind("runs", make, read, short=2, long=150, check=check)
