"""The flags of every command, as its --help lists them, with values that may surprise.

The commands that train, draw or measure are given something that is missing, which they look for
after their flags.
"""

import contextlib
import importlib
import io
import json
import re
import sys
from collections.abc import Sequence
from functools import cache
from random import Random
from unittest import mock

from tests.fuzz.commands.toy import SCENE, SHIPPED
from tests.fuzz.damage import NUMBERS, TEXTS, damaged_bytes, damaged_text
from tests.fuzz.inputs import STDIN, Input, Kind

RECORD = {
    "image": "a.png",
    "messages": [
        {"role": "user", "content": "<image>\n描述图片"},
        {"role": "assistant", "content": "A red circle."},
    ],
}
COMMANDS: dict[str, tuple[str, ...]] = {
    "infer": ("a.png", "描述图片", "--model", SHIPPED, "--max-new-tokens", "2"),
    "train_stage1": ("--data", "missing.jsonl", "--out", "run"),
    "train_stage2": ("--init", SHIPPED, "--data", "missing.jsonl", "--out", "run"),
    "nanovlm.evaluation.__main__": (
        "--model", SHIPPED, "--data", "a.jsonl", "--max-new-tokens", "2"),
    "nanovlm.memory.__main__": ("--vision-encoder", "missing"),
    "nanovlm.bench.__main__": ("--estimate", "missing"),
    "nanovlm.report": ("missing",),
    "data_tools.pack_tar": ("--data", "a.jsonl", "--out", "shards"),
    "data_tools.make_scenes": (
        "--scenes", "1", "--eval-scenes", "1", "--workers", "1", "--out", "s"),
    "data_tools.make_preferences": ("--data", "a.jsonl", "--out", "pairs.jsonl"),
    "data_tools.caption_questions": ("answers.jsonl",),
    "data_tools.extract_vision": ("missing", "--out", "out"),
    "data_tools.flickr8k_cn": (
        "--images", "missing", "--captions", "missing", "--names", "names.txt", "--out", "out"),
    "data_tools.draw_samples": ("missing", "--out", "out.png"),
}  # fmt: skip
# Compiling takes minutes; a large number of these is obeyed, and takes as long.
LEFT_OUT = {"--compile", "--no-compile", "--scenes", "--eval-scenes", "--workers", "--measure"}


@cache
def _flags(command: str) -> dict[str, str]:
    """The flags of a command, and what --help shows behind each."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        _run(command, ["--help"])
    lines = [line.strip() for line in out.getvalue().splitlines() if line.startswith("  -")]
    found = [match for line in lines for match in re.findall(r"(--[\w-]+)(?: (\S+))?", line)]
    return {flag: value for flag, value in found if flag not in LEFT_OUT}


def _run(command: str, arguments: Sequence[str]) -> None:
    with mock.patch.object(sys, "argv", [command, *arguments]):
        importlib.import_module(command).main()


def make(rng: Random) -> Input:
    """A command with flags put in, taken out or damaged."""
    command = rng.choice(list(COMMANDS))
    arguments = list(COMMANDS[command])
    files = {
        "a.png": SCENE,
        "a.jsonl": json.dumps(RECORD).encode() + b"\n",
        "answers.jsonl": b'{"answer": "A dog.", "references": ["A cat."]}\n',
        "names.txt": b"a.png\n",
        STDIN: damaged_bytes(rng, "图里有什么？\nWhat else?\n\n".encode()),
    }
    for _ in range(rng.choice((1, 1, 2))):
        place = rng.randrange(len(arguments) + 1)
        what = rng.randrange(8)
        if what == 0 and place < len(arguments):
            del arguments[place]
        elif what == 1 and place < len(arguments):
            arguments[place] = _value(rng, list(files))
        elif what == 2 and place < len(arguments):
            arguments[place] = damaged_text(rng, arguments[place])
        else:
            flag, shown = rng.choice(list(_flags(command).items()))
            choices = re.findall(r"[\w-]+", shown) if shown.startswith("{") else []
            value = (
                rng.choice(choices) if choices and rng.random() < 0.5 else _value(rng, list(files))
            )
            given = [f"{flag}={value}"] if rng.random() < 0.3 else [flag, value]
            arguments[place:place] = given if shown or rng.random() < 0.1 else [flag]
    given = (argument.replace("\0", "") for argument in (command, *arguments))
    return Input(dict(files), tuple(text.encode("utf-8", "replace").decode() for text in given))


def _value(rng: Random, files: list[str]) -> str:
    return str(rng.choice((rng.choice(NUMBERS), rng.choice(TEXTS), rng.choice(files), "-1", "0")))


def read(input: Input) -> None:
    """Run the command."""
    command, *arguments = input.arguments
    if not {"-h", "--help"} & set(arguments):
        _run(command, arguments)


KIND = Kind("flags", make, read, short=12, long=500)
