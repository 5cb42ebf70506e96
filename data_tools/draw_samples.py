"""Draw the README's samples, nanovlm/assets/samples.png: the same questions at several steps.

    python train_stage1.py --val-every 25
    python train_stage2.py
    python data_tools/draw_samples.py runs/stage1:25,100,335 runs/stage2:1339 \\
        --questions 1,2,4,6 --replace

A column is drawn for each step of each run; without steps, the last one of the run. The questions
are those that every column answers, and `--questions 1,3` picks some of them. Run it in the folder
the runs were started in: their records are named from there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a plain clone

# First, because Ctrl-C is one line from here on, also during the slow imports below.
from nanovlm.utils.console import run_command, say

# isort: split
import re
from argparse import ArgumentTypeError
from typing import NamedTuple

from PIL import Image

from nanovlm.data.records import read_records
from nanovlm.errors import NanoVLMError
from nanovlm.hub.toy import ASSETS
from nanovlm.inputs.image import open_image
from nanovlm.training.monitor.log import read_log
from nanovlm.training.monitor.samples import Answers, answers_at, draw_answers
from nanovlm.utils.outputs import add_replace_flag, check_new_file, new_file
from nanovlm.utils.parser import CommandParser, expand_user

DPI = 200  # twice the README's width, as architecture.png
NUMBERS = r"\d+(,\d+)*"


class Steps(NamedTuple):
    """Some steps of a run; none means the last."""

    run: Path
    steps: list[int]


def parse_steps(text: str) -> Steps:
    """`runs/stage1:25,100` or `runs/stage1`."""
    text = expand_user(text)
    run, _, steps = text.rpartition(":")
    if run and re.fullmatch(NUMBERS, steps):
        return Steps(Path(run), parse_numbers(steps))
    return Steps(Path(text), [])


def parse_numbers(text: str) -> list[int]:
    """`1,3` as [1, 3]."""
    if not re.fullmatch(NUMBERS, text):
        raise ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,3")
    return [int(number) for number in text.split(",")]


def read_columns(chosen: list[Steps]) -> dict[str, Answers]:
    """The answers of each run's steps, by the title of their column."""
    columns = {}
    for run, steps in chosen:
        path = run / "samples.jsonl"
        lines = read_log(path)
        if not lines:
            raise NanoVLMError(f"{path}: holds no answers; name the folder of a run that validated")
        known = sorted({line["step"] for line in lines})
        for step in steps or known[-1:]:
            if step not in known:
                given = ", ".join(map(str, known))
                raise NanoVLMError(f"{path}: has no answers after step {step}; it has {given}")
            columns[f"{run.resolve().name},\nafter step {step:,}"] = answers_at(lines, step)
    return columns


def read_images(questions: list[str]) -> dict[str, Image.Image]:
    """The first image of each of `questions`, which are places such as data/val.jsonl:5."""
    files = {where.rpartition(":")[0] for where in questions}
    records = {record.where: record for file in files for record in read_records(file)[0]}
    if missing := [where for where in questions if where not in records]:
        raise NanoVLMError(f"{missing[0]}: is no usable record; is the data still that of the run?")
    return {
        where: open_image(records[where].images[0]) for where in questions if records[where].images
    }


def main() -> None:
    """Read the flags, draw, write."""
    parser = CommandParser(description="Draw the same questions as answered at several steps.")
    parser.add_argument(
        "runs", type=parse_steps, nargs="+", metavar="RUN[:STEP,STEP]", help="run folder, steps"
    )
    parser.add_argument(
        "--questions", type=parse_numbers, metavar="N,N", help="which, from 1 (default: all)"
    )
    parser.add_argument(
        "--out", type=Path, default=ASSETS / "samples.png", help="default: the README's picture"
    )
    add_replace_flag(parser)
    arguments = parser.parse_args()
    inputs = [run for run, _ in arguments.runs]
    check_new_file(arguments.out, "--out", inputs, replace=arguments.replace)
    columns = read_columns(arguments.runs)
    first, *others = columns.values()
    shared = [where for where in first if all(where in answers for answers in others)]
    if not shared:
        raise NanoVLMError("the runs were asked no question in common; did they use other --val?")
    numbers = arguments.questions or range(1, len(shared) + 1)
    if not set(numbers) <= set(range(1, len(shared) + 1)):
        raise NanoVLMError(f"--questions: there are questions 1 to {len(shared)}")
    images = read_images([shared[number - 1] for number in numbers])
    if not images:
        raise NanoVLMError("none of the questions is about an image; there is nothing to draw")
    with new_file(arguments.out, replace=arguments.replace) as temporary:
        draw_answers(temporary, images, columns, DPI)
        with Image.open(temporary) as drawn:  # a palette of 256 colours: a third of the bytes
            palette = drawn.convert("RGB").quantize(method=Image.Quantize.MAXCOVERAGE, kmeans=3)
        palette.save(temporary, format="PNG", optimize=True)
    say(str(arguments.out))


if __name__ == "__main__":
    run_command(main)
