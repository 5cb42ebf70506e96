"""A few held-out questions, answered at every validation to show what the model has learned.

samples.jsonl   one line per answer: step, where, prompt, answer, reference
samples.png     one row per question about an image, one column per validation (the first and the
                last five), and the reference
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from nanovlm.data.records import Record
from nanovlm.errors import NanoVLMError
from nanovlm.evaluation.answers import answer_records, references_of
from nanovlm.evaluation.metrics import exact_match
from nanovlm.inputs.image import open_image, resized_within
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.monitor.log import append_lines, keep_lines, read_log
from nanovlm.training.precision import Precision
from nanovlm.utils.console import say
from nanovlm.utils.figures import plt, save_figure
from nanovlm.utils.files import to_jsonl

WATCHED = 6  # questions
LAST_SHOWN = 5  # validations in the figure, besides the first
MAX_NEW_TOKENS = 64
# Chinese, Japanese and Korean characters, which take two columns.
WIDE = "\u2e80-\U0010ffff"
CLOSING = "、。，．：；！？）》」』】〉〕"  # marks that no line begins with
# The figure, in inches: the side of an image, the width of an answer with its margin, the heights
# of the header and of a line of text.
IMAGE, ANSWER, HEADER, LINE, MARGIN = 0.9, 1.56, 0.4, 0.17, 0.1
PIXELS = 160  # longer side of an image in the figure
ANSWER_CELL = (20, 11)  # columns and lines of text
QUESTION_LINES = 3
RIGHT, OTHER, FAINT = "#1a7f37", "#24292f", "#6e7781"  # an answer equal to its reference; others


class Samples:
    """Answers to a few of `records`, spread evenly.

    A resumed run drops those after its checkpoint, since it repeats them.
    """

    def __init__(self, run: Path, records: Sequence[Record], start_step: int) -> None:
        self.run, self.path = run, run / "samples.jsonl"
        self.watched = records[:: max(1, len(records) // WATCHED)][:WATCHED]
        self.lines = keep_lines(self.path, start_step)

    def answer(
        self, model: VisionLanguageModel, step: int, precision: Precision
    ) -> list[dict[str, Any]]:
        """Answer greedily (so without random numbers), append to the file and redraw the figure.

        Returns the lines appended. An error of an image or a prompt is reported and does not stop
        the training.
        """
        model.eval()
        new: list[dict[str, Any]] = []
        try:
            with precision.autocast(next(model.parameters()).device):  # of fsdp's model the CPU
                new = self.new_lines(model, step)
            if new:
                self.lines += new
                append_lines(self.path, new)
                self.draw()
        except NanoVLMError as error:
            say(f"step {step}: the watched questions are not answered: {error}")
        finally:
            model.train()
        return new

    def new_lines(self, model: VisionLanguageModel, step: int) -> list[dict[str, Any]]:
        """A line for each question that can be answered."""
        answers = answer_records(model, self.watched, MAX_NEW_TOKENS)
        return [
            {
                "step": step,
                "where": record.where,
                "prompt": _question(record),
                "answer": answer,
                "reference": references_of(record)[0],
            }
            for record, answer in zip(self.watched, answers)
            if answer is not None
        ]

    def draw(self) -> None:
        """Draw `samples.png` from all answers so far, if any question is about an image."""
        steps = sorted({line["step"] for line in self.lines})
        columns = {
            f"after step {step:,}": answers_at(self.lines, step)
            for step in steps[:1] + steps[1:][-LAST_SHOWN:]
        }
        asked = {where for answers in columns.values() for where in answers}
        images = {
            record.where: open_image(record.images[0])
            for record in self.watched
            if record.images and record.where in asked
        }
        if images:
            draw_answers(self.run / "samples.png", images, columns)


Answers = dict[str, dict[str, Any]]  # lines of samples.jsonl by their `where`


def answers_at(lines: list[dict[str, Any]], step: int) -> Answers:
    """The answers that were given after `step`."""
    return {line["where"]: line for line in lines if line["step"] == step}


def last_answers(run: Path) -> str:
    """The answers of the last validation as JSON lines without their step; "" if there are none."""
    path = run / "samples.jsonl"
    lines = read_log(path)
    last = [line for line in lines if line["step"] == lines[-1]["step"]]
    shown = [{key: value for key, value in line.items() if key != "step"} for line in last]
    return to_jsonl(shown).rstrip()


def draw_answers(
    path: Path, images: Mapping[str, Image.Image], columns: Mapping[str, Answers], dpi: int = 110
) -> None:
    """Draw one row for each image and one column for the answers under each title.

    `images` has the same keys as the answers, which are lines of `samples.jsonl`. An answer equal
    to its reference is green.
    """
    width = IMAGE + 3 * MARGIN + ANSWER * max(len(columns) + 1, 3)
    figure = plt.figure(figsize=(width, 1), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    with plt.rc_context({"font.size": 9, "text.parse_math": False}):
        page = _Page(axes, width)
        for number, title in enumerate([*columns, "reference"]):
            page.write(number, HEADER - MARGIN / 2, title, va="bottom", weight="bold")
        for where, image in images.items():
            page.draw_row(image, [answers.get(where) for answers in columns.values()])
        axes.set(xlim=(0, width), ylim=(page.y, 0), aspect="auto")
        axes.axis("off")
        figure.set_size_inches(width, page.y)
        save_figure(figure, path, dpi)


class _Page:
    """The whole figure, measured in inches from its upper left corner; `y` is where it ends."""

    def __init__(self, axes: Axes, width: float) -> None:
        self.axes, self.width, self.y = axes, width, HEADER

    def draw_row(self, image: Image.Image, lines: Sequence[dict[str, Any] | None]) -> None:
        """One image, its question, and below that the answer in each column and the reference.

        A column without a line for this image stays empty.
        """
        known = next(line for line in lines if line)
        room = int(ANSWER_CELL[0] * (self.width - IMAGE) / ANSWER)
        question = wrap(known["prompt"], room, QUESTION_LINES)
        answers = [
            wrap(line["answer"] or "(nothing)", *ANSWER_CELL) if line else "" for line in lines
        ]
        reference = wrap(known["reference"], *ANSWER_CELL)
        below = self.y + MARGIN + LINE * (question.count("\n") + 1) + MARGIN / 2
        longest = max(text.count("\n") + 1 for text in (*answers, reference))
        end = max(self.y + IMAGE, below + LINE * longest) + MARGIN
        self.axes.plot((0, self.width), (self.y, self.y), color=FAINT, linewidth=0.4)
        self._draw_image(image, self.y + (end - self.y) / 2)
        self.write(0, self.y + MARGIN, question)
        for number, (line, answer) in enumerate(zip(lines, answers)):
            is_right = line and exact_match(line["answer"], [line["reference"]])
            self.write(number, below, answer, color=RIGHT if is_right else OTHER)
        self.write(len(lines), below, reference, color=FAINT)
        self.y = end

    def write(self, column: int, y: float, text: str, **style: Any) -> None:
        """A text whose top is at `y`, in a column of answers."""
        x = IMAGE + 2 * MARGIN + ANSWER * column
        self.axes.text(x, y, text, **{"va": "top", "color": OTHER, **style})

    def _draw_image(self, image: Image.Image, y: float) -> None:
        shrunk = resized_within(image, PIXELS)
        right, down = ((IMAGE - MARGIN) / 2 * side / PIXELS for side in shrunk.size)
        x = MARGIN + IMAGE / 2  # of its centre
        self.axes.imshow(np.asarray(shrunk), extent=(x - right, x + right, y + down, y - down))


def wrap(text: str, width: int, most: int) -> str:
    """Break a text into at most `most` lines of `width` columns; a longer one ends in an ellipsis.

    Lines break between words, or after any Chinese character; a closing mark may stand one place
    beyond the width.
    """
    lines, columns = [""], 0
    text = text.encode(errors="replace").decode()  # half of a UTF-16 pair cannot be drawn
    for piece in re.findall(rf" |[{WIDE}]|[^ {WIDE}]{{1,{width}}}", " ".join(text.split())):
        size = 2 if re.match(f"[{WIDE}]", piece) else len(piece)
        hangs = piece in CLOSING and columns <= width
        if columns + size > width and not hangs:
            lines, columns = [*lines, ""], 0
        if columns or piece != " ":  # no line begins with the space it was broken at
            lines[-1] += piece
            columns += size
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1][: width - 1] + "…"]
    return "\n".join(lines)


def _question(record: Record) -> str:
    """The text of the user's last turn."""
    turns = [message.content for message in record.messages if message.role == "user"]
    return " ".join(part for part in turns[-1] if isinstance(part, str)).strip() if turns else ""
