"""A contact sheet: records with their image, question and answer, to look at before training."""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image

from data_tools.check.looking import answer_of, question_of
from nanovlm.data.records import Record
from nanovlm.data.sequences import chunks
from nanovlm.errors import NanoVLMError
from nanovlm.inputs.image import open_image, resized_within
from nanovlm.training.monitor.samples import FAINT, OTHER, wrap
from nanovlm.utils.figures import plt, save_figure

COLUMNS, RECORDS = 6, 30
# In inches: a cell, the image in it, a line of text, and the space around.
WIDTH, PICTURE, LINE, MARGIN = 2.0, 1.55, 0.135, 0.1
PIXELS = 200  # longer side of an image
LETTERS, QUESTION, ANSWER = 31, 3, 5  # columns of text, and lines at most


def choose(records: Sequence[Record], number: int = RECORDS, seed: int = 0) -> list[Record]:
    """A random sample of records, in their order: the same for the same records and seed."""
    chosen = random.Random(seed).sample(range(len(records)), min(number, len(records)))
    return [records[index] for index in sorted(chosen)]


def draw_sheet(path: Path, records: Sequence[Record]) -> None:
    """Draw records in rows of COLUMNS, each with its first image, its last question and answer."""
    width = min(COLUMNS, len(records)) * WIDTH + MARGIN
    figure = plt.figure(figsize=(width, 1), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    bottom = MARGIN
    with plt.rc_context({"text.parse_math": False}):
        for row in chunks(list(records), COLUMNS):
            top, lefts = bottom + MARGIN, (MARGIN + column * WIDTH for column in range(COLUMNS))
            bottom = max(_draw_record(axes, record, x, top) for record, x in zip(row, lefts))
        axes.set(xlim=(0, width), ylim=(bottom + MARGIN, 0), aspect="auto")
        axes.axis("off")
        figure.set_size_inches(width, bottom + MARGIN)
        save_figure(figure, path, dpi=120)


def _draw_record(axes: Axes, record: Record, x: float, y: float) -> float:
    """One record whose upper left corner is (x, y); returns where it ends."""
    name = record.where.replace("\\", "/").rpartition("/")[2]
    more = f" (+{len(record.images) - 1} images)" if len(record.images) > 1 else ""
    texts = (
        (wrap(name + more, LETTERS, 1), FAINT),
        (wrap(question_of(record), LETTERS, QUESTION), FAINT),
        (wrap(answer_of(record), LETTERS, ANSWER), OTHER),
    )
    for number, (text, color) in enumerate(texts):
        axes.text(x, y, text, color=color, va="top", fontsize=7)
        y += LINE * (text.count("\n") + 1) + MARGIN / 2
        if number == 0 and record.images:
            _draw_image(axes, record.images[0], x, y)
            y += PICTURE + MARGIN / 2
    return y


def _draw_image(axes: Axes, path: Path, x: float, y: float) -> None:
    """An image in its place, whose upper left corner is (x, y)."""
    try:
        shrunk = resized_within(open_image(path), PIXELS, Image.Resampling.LANCZOS)
    except NanoVLMError:
        axes.text(x, y + PICTURE / 2, "cannot be read", color="#cf222e", fontsize=7)
        return
    width, height = (PICTURE * side / max(shrunk.size) for side in shrunk.size)
    top = y + (PICTURE - height) / 2
    extent = (x, x + width, top + height, top)
    axes.imshow(np.asarray(shrunk), extent=extent, interpolation="lanczos")
    # A white image shows on white paper, too.
    axes.add_patch(
        Rectangle((x, top), width, height, fill=False, edgecolor="#d0d7de", linewidth=0.5)
    )
