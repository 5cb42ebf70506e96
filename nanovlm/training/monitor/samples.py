"""The same few held-out questions answered at every validation, so that a reader watches the model learn to see.

samples.jsonl   one line an answer: step, where, prompt, answer, reference
samples.png     one row a question about an image, one column a validation: the first and the last five
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
LAST_SHOWN = 5  # validations in the picture, besides the first
MAX_NEW_TOKENS = 64
WIDE = "\u2e80-\U0010ffff"  # Chinese, Japanese and Korean, for what is drawn here: two columns a character
HEADER, ROW, PICTURE, ANSWER = (
    0.3,
    1.3,
    1.24,
    2.2,
)  # inches in the picture: heights, side of an image, width of an answer
QUESTION_AT, ANSWERS_AT = 1.4, 4.3  # inches from the left
PIXELS = 160  # longer side of an image there
QUESTION_CELL, ANSWER_CELL, TITLE = (38, 4), (28, 8), (99, 1)  # columns and lines of text
RIGHT, OTHER = "#1a7f37", "#24292f"  # colours of an answer that is its reference, and of any other


class Samples:
    """Answers spread evenly over `records`. A resumed run drops those after its checkpoint, which it will give again."""

    def __init__(self, run: Path, records: Sequence[Record], start_step: int) -> None:
        self.run, self.path = run, run / "samples.jsonl"
        self.watched = records[:: max(1, len(records) // WATCHED)][:WATCHED]
        self.lines = keep_lines(self.path, start_step)

    def answer(self, model: VisionLanguageModel, step: int, precision: Precision) -> None:
        """Answer greedily, which draws no random numbers, append to `samples.jsonl` and redraw `samples.png`.

        What goes wrong with an image or a prompt is told, and does not stop the training.
        """
        model.eval()
        try:
            with precision.autocast(next(model.parameters()).device):  # with fsdp the CPU
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
        """Draw `samples.png` from all answers so far; without a question about an image there is nothing to draw."""
        rows = [
            (
                open_image(record.images[0]),
                [line for line in self.lines if line["where"] == record.where],
            )
            for record in self.watched
            if record.images
        ]
        if rows := [(picture, lines) for picture, lines in rows if lines]:
            draw_strip(self.run / "samples.png", rows)


def last_answers(run: Path) -> str:
    """The answers of the last validation as JSON lines, without their step; nothing where none was asked for."""
    path = run / "samples.jsonl"
    lines = read_jsonl(path) if path.exists() else []
    return to_jsonl(
        [
            {key: value for key, value in line.items() if key != "step"}
            for line in lines
            if line["step"] == lines[-1]["step"]
        ]
    ).rstrip()


def draw_strip(path: Path, rows: list[tuple[Image.Image, list[dict[str, Any]]]]) -> None:
    """One row for each image and the lines of `samples.jsonl` about it; an answer equal to its reference is green.

    Where the system has no font with Chinese characters, a cell that needs one points to samples.jsonl.
    """
    steps = sorted({line["step"] for _, lines in rows for line in lines})
    columns = {
        step: ANSWERS_AT + number * ANSWER
        for number, step in enumerate(steps[:1] + steps[1:][-LAST_SHOWN:])
    }
    width, height = ANSWERS_AT + ANSWER * len(columns), HEADER + ROW * len(rows)
    chinese = chinese_fonts()
    with plt.rc_context(
        {"font.family": [*chinese, "DejaVu Sans"], "font.size": 9, "text.parse_math": False}
    ):
        figure = plt.figure(figsize=(width, height))
        page = figure.add_axes((0, 0, 1, 1))  # measured in inches from the upper left corner

        def write(
            x: float, y: float, text: str, cell: tuple[int, int], va: str = "center", **style: str
        ) -> None:
            if not chinese and re.search(f"[{WIDE}]", text):
                text, style["style"] = "(see samples.jsonl: no Chinese font here)", "italic"
            page.text(x, y, wrap(text, *cell), va=va, **style)

        write(QUESTION_AT, HEADER / 2, "question, and what was to be said", TITLE, weight="bold")
        for step, x in columns.items():
            write(x, HEADER / 2, f"after step {step:,}", TITLE, weight="bold")
        for number, (image, lines) in enumerate(rows):
            middle = HEADER + ROW * (number + 0.5)
            picture = ImageOps.contain(image, (PIXELS, PIXELS))
            half_width, half_height = (PICTURE / 2 * side / PIXELS for side in picture.size)
            page.imshow(
                np.asarray(picture),
                extent=(
                    ROW / 2 - half_width,
                    ROW / 2 + half_width,
                    middle + half_height,
                    middle - half_height,
                ),
            )
            write(QUESTION_AT, middle - 0.05, lines[-1]["prompt"], QUESTION_CELL, va="bottom")
            write(
                QUESTION_AT,
                middle + 0.05,
                f"= {lines[-1]['reference']}",
                QUESTION_CELL,
                va="top",
                color=RIGHT,
            )
            for line in lines:
                if line["step"] in columns:
                    right = exact_match(line["answer"], [line["reference"]])
                    write(
                        columns[line["step"]],
                        middle,
                        line["answer"] or "(nothing)",
                        ANSWER_CELL,
                        color=RIGHT if right else OTHER,
                    )
        page.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
        page.axis("off")
        save_figure(figure, path)


def wrap(text: str, width: int, most: int) -> str:
    """Break between words, or after any Chinese character, so that no line has more than `width` columns. What `most` lines
    do not hold ends in an ellipsis."""
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
    """The text of the last thing the user says."""
    asked = next(
        (message.content for message in reversed(record.messages) if message.role == "user"), ()
    )
    return " ".join(part for part in asked if isinstance(part, str)).strip()
