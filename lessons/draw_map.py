"""Draw the map of the lessons: python lessons/draw_map.py writes lessons/map.png."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from lessons.draw import DPI, FAINT, INK, PALE, STRONG
from lessons.notebooks import FOLDER

# Number: (title, column, row, part); rows count downwards.
LESSONS = {
    "00": ("Does it see?", 0, 1.5, "right"),
    "01": ("image → patches", 1, 0, "vision"),
    "02": ("attention", 2, 0, "vision"),
    "03": ("vision\ntransformer", 3, 0, "vision"),
    "08": ("projectors", 4, 0, "projector"),
    "04": ("tokenizers", 1, 1.5, "word"),
    "05": ("conversations", 2, 1.5, "word"),
    "06": ("language\nmodel I", 3, 1.5, "language"),
    "07": ("language\nmodel II", 4, 1.5, "language"),
    "09": ("the splice", 5, 0.75, "projector"),
    "10": ("generation", 6, 0.75, "language"),
    "11": ("the loss", 0, 3, "language"),
    "12": ("loading\nweights", 1, 3, "word"),
    "13": ("gradient\naccumulation", 2, 3, "language"),
    "14": ("training loop", 3, 3, "language"),
    "15": ("mixed\nprecision", 4, 3, "language"),
    "16": ("batches", 5, 3, "word"),
    "17": ("measuring", 6, 2.1, "right"),
    "18": ("why two\nstages", 6, 3.4, "right"),
}
LATER = ("adapters", "few bits", "preferences", "experts", "many machines", "capstone")
ARROWS = (
    "00 01", "00 04", "01 02", "02 03", "03 08", "04 05", "05 06", "06 07", "08 09", "07 09",
    "09 10", "11 12", "12 13", "13 14", "14 15", "15 16", "16 18", "10 17", "17 18",
)  # fmt: skip
HOUR = ("00", "01", "09")  # the path "see it all in an hour"


def draw_map(path: Path) -> None:
    """Write the map as a PNG of 900 pixels' width."""
    made = Figure(figsize=(9, 4.6), dpi=DPI)
    axes = made.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.7, 6.7), ylim=(-4.85, 0.75))
    axes.axis("off")
    for arrow in ARROWS:
        start, end = (LESSONS[number][1:3] for number in arrow.split())
        _arrow(axes, start, end)
    for number, (title, column, row, part) in LESSONS.items():
        _box(axes, (column, row), f"{number}\n{title}", part, number in HOUR)
    for place, title in enumerate(LATER):
        axes.text(
            0.55 + place * 1.06, -4.42, title, ha="center", va="center", fontsize=8, color=FAINT,
            bbox=dict(boxstyle="round,pad=0.4", facecolor="white", edgecolor="#c5ccd3", ls="--"),
        )  # fmt: skip
    axes.text(-0.55, -4.42, "later:", ha="left", va="center", fontsize=8.5, color=FAINT)
    axes.text(
        -0.55, 0.62, "thick border: see it all in an hour", fontsize=8.5, color=FAINT, va="center"
    )
    made.savefig(path, dpi=DPI, facecolor="white", metadata={"Software": None})


def _box(axes: Axes, place: tuple[float, float], text: str, part: str, thick: bool) -> None:
    x, y = place[0], -place[1]
    axes.add_patch(
        FancyBboxPatch(
            (x - 0.42, y - 0.36), 0.84, 0.72, boxstyle="round,pad=0,rounding_size=0.09",
            facecolor=PALE[part], edgecolor=STRONG[part], linewidth=3 if thick else 1.1, zorder=2,
        )
    )  # fmt: skip
    number, title = text.split("\n", 1)
    axes.text(
        x, y + 0.2, number, ha="center", va="center", fontsize=9, fontweight="bold", zorder=3,
        color=INK,
    )  # fmt: skip
    axes.text(x, y - 0.1, title, ha="center", va="center", fontsize=8, zorder=3, color=INK)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    shrink = 27 if start[0] == end[0] else 42
    axes.add_patch(
        FancyArrowPatch(
            (start[0], -start[1]), (end[0], -end[1]), arrowstyle="-|>", mutation_scale=11,
            shrinkA=shrink, shrinkB=shrink, color="#9aa5b1", linewidth=1.2, zorder=1,
        )
    )  # fmt: skip


if __name__ == "__main__":
    draw_map(FOLDER / "map.png")
