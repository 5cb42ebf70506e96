"""A command as a process: its streams closed, full or of another encoding, and signals."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from random import Random

from tests.fuzz.commands.flags import RECORD
from tests.fuzz.commands.toy import FLAGS, SCENE, SHIPPED, arguments_of, scenes
from tests.fuzz.inputs import FaultError, Input, Kind
from tests.fuzz.judge import REPOSITORY

REDIRECTIONS = (
    "",
    "<&-",
    ">&-",
    "2>&-",
    "<&- >&- 2>&-",
    ">/dev/full",
    "2>/dev/full",
    "| head -c 1",
)
VARIABLES = (
    "", "PYTHONIOENCODING=ascii", "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0",
    "RANK= WORLD_SIZE=", "PYTHONIOENCODING=gbk", "COLUMNS=1", "OMP_NUM_THREADS=",
    "WORLD_SIZE=x", "RANK=5",
)  # fmt: skip
SIGNALS = ("INT", "TERM", "KILL")
RECORDS = 60
TRAINED = {"data": "toy/train.jsonl", "max-steps": "20", "save-every": "5", "bucket": "4"}
COMMANDS = (
    ("infer.py", "a.png", "描述图片", "--model", SHIPPED, "--max-new-tokens", "5"),
    ("infer.py", "a.png", "--chat", "--model", SHIPPED, "--max-new-tokens", "5"),
    ("data_tools/make_scenes.py", "--out", "s", "--scenes", "150", "--workers", "1"),
    ("data_tools/pack_tar.py", "--data", "a.jsonl", "--out", "shards"),
    ("train_stage2.py", *arguments_of(FLAGS | TRAINED)),
    ("-m", "nanovlm.evaluation", "--model", SHIPPED, "--data", "a.jsonl", "--answers", "b.jsonl",
     "--max-new-tokens", "3"),
)  # fmt: skip
ENDS = {0, 2, 130, 141, 143, *(-getattr(signal, f"SIG{name}") for name in SIGNALS)}


def make(rng: Random) -> Input:
    """A command, with variables, redirections or a signal after up to six seconds."""
    # Their own folder is what one of the tools makes.
    toy = {name.replace("s/", "toy/", 1): data for name, data in scenes().items()}
    records = json.dumps(RECORD).encode() + b"\n"
    given = (rng.choice(VARIABLES), shlex.join(rng.choice(COMMANDS)))
    if rng.random() < 0.5:
        given = ("", given[1], "", f"{rng.choice(SIGNALS)} {rng.uniform(0.05, 6):.2f}")
    else:
        given = (*given, rng.choice(REDIRECTIONS), "")
    return Input({"a.png": SCENE, "a.jsonl": records * RECORDS, **toy}, given)


def read(input: Input) -> None:
    """Run it; it ends with one of the promised codes and without a traceback."""
    variables, command, redirection, sent = input.arguments
    script, arguments = command.split(" ", 1)
    script = script if script == "-m" else str(REPOSITORY / script)
    before = "set -o pipefail;" if redirection.startswith("|") else "exec"
    program = f"{before} env {variables} {sys.executable} {script} {arguments} {redirection}"
    process = subprocess.Popen(
        ["bash", "-c", program],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        if sent:
            name, after = sent.split()
            try:
                process.wait(float(after))
            except subprocess.TimeoutExpired:
                process.send_signal(getattr(signal, f"SIG{name}"))
        _, stderr = process.communicate()
    finally:
        process.kill()
    printed = stderr.decode(errors="replace")
    if "Traceback" in printed or "Exception ignored" in printed:
        raise FaultError(f"a traceback: {printed.strip().splitlines()[-1]}")
    if process.returncode not in ENDS:
        raise FaultError(f"exit code {process.returncode}")


def check(input: Input, folder: Path, _: bool) -> None:
    """The inputs are as they were, and an output is whole or not there."""
    if changed := input.changed(folder):
        raise FaultError(f"changed {', '.join(changed)}")
    for path in (folder / "b.jsonl", folder / "shards" / "shard-00000.jsonl"):
        if path.exists() and path.read_bytes().count(b"\n") != RECORDS:
            raise FaultError(f"{path.name} is there and not whole")
    if (folder / "s").exists() and not (folder / "s" / "world.json").exists():
        raise FaultError("a folder of scenes is there and not whole")
    model = folder / "run" / "model"
    if model.exists() and not (model / "model.safetensors").exists():
        raise FaultError("a model is there and not whole")


KIND = Kind("streams", make, read, short=0, long=60, check=check)
