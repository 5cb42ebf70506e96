"""A few held-out questions, answered at every validation to show what the model has learned.

samples.jsonl   one line per answer: step, where, prompt, answer, reference
samples.png     one row per question about an image, one column per validation: the first and the
                last five
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from PIL import Image, ImageOps

from nanovlm.data.records import Record
from nanovlm.errors import NanoVLMError
from nanovlm.evaluation.answers import answer_records, references_of
from nanovlm.evaluation.metrics import exact_match
from nanovlm.inputs.image import open_image
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.monitor.log import append_lines, keep_lines
from nanovlm.training.precision import Precision
from nanovlm.utils.console import say
from nanovlm.utils.figures import chinese_fonts, plt, save_figure
from nanovlm.utils.files import read_jsonl, to_jsonl

WATCHED = 6  # questions
LAST_SHOWN = 5  # validations in the figure, besides the first
MAX_NEW_TOKENS = 64
# Chinese, Japanese and Korean characters, which take two columns.
WIDE = "\u2e80-\U0010ffff"
HEADER, ROW = 0.3, 1.3  # heights in the figure, in inches
IMAGE, ANSWER = 1.24, 2.2  # side of an image and width of an answer, in inches
QUESTION_AT, ANSWERS_AT = 1.4, 4.3  # inches from the left
PIXELS = 160  # longer side of an image in the figure
QUESTION_CELL, ANSWER_CELL, TITLE = (38, 4), (28, 8), (99, 1)  # columns and lines of text
RIGHT, OTHER = "#1a7f37", "#24292f"  # colours of an answer equal to its reference, and others


class Samples:
    """Answers to a few of `records`, spread evenly.

    A resumed run drops those after its checkpoint, since it repeats them.
    """

    def __init__(self, run: Path, records: Sequence[Record], start_step: int) -> None:
        self.run, self.path = run, run / "samples.jsonl"
        self.watched = records[:: max(1, len(records) // WATCHED)][:WATCHED]
        self.lines = keep_lines(self.path, start_step)

    def answer(self, model: VisionLanguageModel, step: int, precision: Precision) -> None:
        """Answer greedily (so without random numbers), append to the file and redraw the figure.

        An error of an image or a prompt is reported and does not stop the training.
        """
        model.eval()
        try:
            with precision.autocast(next(model.parameters()).device):  # of fsdp's model the CPU
                answers = list(answer_records(model, self.watched, MAX_NEW_TOKENS))
            new = [
                {
                    "step": step,
                    "where": record.where,
                    "prompt": _question(record),
                    "answer": answer,
                    "reference": references_of(record)[0],
                }
                for record, answer in zip(self.watched, answers)
            ]
            self.lines += new
            append_lines(self.path, new)
            self.draw()
        except NanoVLMError as error:
            say(f"step {step}: the watched questions are not answered: {error}")
        finally:
            model.train()

    def draw(self) -> None:
        """Draw `samples.png` from all answers so far, if any question is about an image."""
        rows = []
        for record in self.watched:
            lines = [line for line in self.lines if line["where"] == record.where]
            if record.images and lines:
                rows.append((open_image(record.images[0]), lines))
        if rows:
            draw_answers(self.run / "samples.png", rows)


def last_answers(run: Path) -> str:
    """The answers of the last validation as JSON lines without their step; "" if there are none."""
    path = run / "samples.jsonl"
    lines = read_jsonl(path) if path.exists() else []
    last = [line for line in lines if line["step"] == lines[-1]["step"]]
    shown = [{key: value for key, value in line.items() if key != "step"} for line in last]
    return to_jsonl(shown).rstrip()


def draw_answers(path: Path, rows: list[tuple[Image.Image, list[dict[str, Any]]]]) -> None:
    """Draw one row for each image and the lines of `samples.jsonl` about it.

    An answer equal to its reference is green. Where the system has no font with Chinese characters,
    a cell that needs one points to samples.jsonl.
    """
    steps = sorted({line["step"] for _, lines in rows for line in lines})
    shown = steps[:1] + steps[1:][-LAST_SHOWN:]
    columns = {step: ANSWERS_AT + number * ANSWER for number, step in enumerate(shown)}
    width, height = ANSWERS_AT + ANSWER * len(columns), HEADER + ROW * len(rows)
    chinese = chinese_fonts()
    fonts = [*chinese, "DejaVu Sans"]
    with plt.rc_context({"font.family": fonts, "font.size": 9, "text.parse_math": False}):
        figure = plt.figure(figsize=(width, height))
        page = _Page(figure.add_axes((0, 0, 1, 1)), bool(chinese))
        page.write(QUESTION_AT, HEADER / 2, "question and reference", TITLE, weight="bold")
        for step, x in columns.items():
            page.write(x, HEADER / 2, f"after step {step:,}", TITLE, weight="bold")
        for number, (image, lines) in enumerate(rows):
            page.draw_row(HEADER + ROW * (number + 0.5), image, lines, columns)
        page.axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
        page.axes.axis("off")
        save_figure(figure, path)


@dataclass
class _Page:
    """The whole figure, measured in inches from its upper left corner."""

    axes: Axes
    has_chinese_font: bool

    def draw_row(
        self, y: float, image: Image.Image, lines: list[dict[str, Any]], columns: dict[int, float]
    ) -> None:
        """One image, its question, and the answers of the steps in `columns` (step → x)."""
        shrunk = ImageOps.contain(image, (PIXELS, PIXELS))
        right, down = (IMAGE / 2 * side / PIXELS for side in shrunk.size)  # from its centre
        extent = (ROW / 2 - right, ROW / 2 + right, y + down, y - down)
        self.axes.imshow(np.asarray(shrunk), extent=extent)
        question, reference = lines[-1]["prompt"], f"= {lines[-1]['reference']}"
        self.write(QUESTION_AT, y - 0.05, question, QUESTION_CELL, va="bottom")
        self.write(QUESTION_AT, y + 0.05, reference, QUESTION_CELL, va="top", color=RIGHT)
        for line in lines:
            if line["step"] in columns:
                colour = RIGHT if exact_match(line["answer"], [line["reference"]]) else OTHER
                answer = line["answer"] or "(nothing)"
                self.write(columns[line["step"]], y, answer, ANSWER_CELL, color=colour)

    def write(self, x: float, y: float, text: str, cell: tuple[int, int], **style: str) -> None:
        """A text of at most `cell` columns and lines."""
        if not self.has_chinese_font and re.search(f"[{WIDE}]", text):
            text, style["style"] = "(see samples.jsonl: no Chinese font here)", "italic"
        options: dict[str, Any] = {"va": "center", **style}
        self.axes.text(x, y, wrap(text, *cell), **options)


def wrap(text: str, width: int, most: int) -> str:
    """Break a text into at most `most` lines of `width` columns; a longer one ends in an ellipsis.

    Lines break between words, or after any Chinese character.
    """
    lines, columns = [""], 0
    for piece in re.findall(rf" |[{WIDE}]|[^ {WIDE}]{{1,{width}}}", " ".join(text.split())):
        size = 2 if re.match(f"[{WIDE}]", piece) else len(piece)
        if columns + size > width:
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
