"""Pictures of the lessons: one width, white ground, and colours that mean the same everywhere.

Purple is vision, orange the projector, blue the language model, grey words, green right, red wrong.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from IPython.display import Image, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from torch import Tensor

import nanovlm.utils.figures  # noqa: F401 (it gives matplotlib a font with Chinese characters)

INK, FAINT = "#1f2933", "#667380"
VISION, PROJECTOR, LANGUAGE = "#7d5fc7", "#d98a1f", "#4a7fc1"
WORD, RIGHT, WRONG = "#8b97a3", "#3c8d4c", "#c8402f"
PALE = {
    "vision": "#e9e2f8",
    "projector": "#fde6c8",
    "language": "#d6e6fb",
    "word": "#e4e9ee",
    "right": "#cfe8d2",
    "wrong": "#f6d5d0",
}
STRONG = {
    "vision": VISION,
    "projector": PROJECTOR,
    "language": LANGUAGE,
    "word": WORD,
    "right": RIGHT,
    "wrong": WRONG,
}
# The way of an image through the model: station, and the part that it belongs to.
STATIONS = (
    ("image", "vision"),
    ("patches", "vision"),
    ("patch vectors", "vision"),
    ("visual tokens", "projector"),
    ("sequence", "word"),
    ("hidden states", "language"),
    ("logits", "language"),
    ("answer", "right"),
)
WIDTH, DPI = 8.0, 100  # inches, pixels an inch: every picture is 800 pixels wide

matplotlib.rcParams.update(
    {
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": matplotlib.cycler(
            color=[LANGUAGE, PROJECTOR, VISION, RIGHT, WRONG, WORD]
        ),
    }
)


def figure(columns: int = 1, height: float = 3.0, rows: int = 1, **options: Any) -> tuple:
    """A figure of the lessons' width, `height` inches tall, and axes as `plt.subplots` gives."""
    made = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    return made, made.subplots(rows, columns, **options)


def show(made: Figure, title: str = "") -> None:
    """Display a figure under its message."""
    if title:
        made.suptitle(title, fontsize=12, fontweight="bold")
    file = io.BytesIO()
    made.savefig(file, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    display(Image(file.getvalue()))


def strip(*lit: str) -> None:
    """The way from image to answer, with today's stations lit."""
    unknown = set(lit) - {name for name, _ in STATIONS}
    if unknown:
        raise ValueError(f"no station {sorted(unknown)}; there are {[n for n, _ in STATIONS]}")
    made = Figure(figsize=(WIDTH, 0.62), dpi=DPI)
    axes = made.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 8), ylim=(0, 1))
    axes.axis("off")
    for number, (name, part) in enumerate(STATIONS):
        on = name in lit
        box = FancyBboxPatch(
            (number + 0.05, 0.24),
            0.84,
            0.52,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=PALE[part] if on else "white",
            edgecolor=STRONG[part] if on else "#d5dbe1",
            linewidth=1.8 if on else 1.0,
        )
        axes.add_patch(box)
        weight, colour = ("bold", INK) if on else ("normal", "#9aa5b1")
        axes.text(
            number + 0.47, 0.5, name, ha="center", va="center", fontsize=7.4,
            color=colour, fontweight=weight,
        )  # fmt: skip
        if number:
            axes.text(number - 0.03, 0.49, "›", ha="center", va="center", fontsize=12, color=FAINT)
    show(made)


def picture(axes: Axes, image: Any, title: str = "") -> None:
    """An image without axes: a PIL image, or a tensor (3, H, W) or (H, W, 3) in [0, 1]."""
    if isinstance(image, Tensor):
        image = image.detach().float().cpu()
        if image.dim() == 3 and image.shape[0] == 3:
            image = image.permute(1, 2, 0)
        image = image.clamp(0, 1).numpy()
    axes.imshow(np.asarray(image), interpolation="nearest")
    axes.set_title(title)
    axes.axis("off")


def heat(  # noqa: PLR0913 (a picture's options, by keyword)
    axes: Axes,
    values: Tensor,
    title: str = "",
    numbers: str = "",
    colours: str = "Purples",
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    limits: tuple[float, float] | None = None,
) -> Any:
    """A matrix as colours; `numbers`, such as ".2f", prints each value into its cell."""
    grid = values.detach().float().cpu()
    low, high = limits or (float(grid.min()), float(grid.max()))
    drawn = axes.imshow(
        grid.numpy(), cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest"
    )
    axes.set_title(title)
    axes.set_xticks(range(len(columns)), columns, rotation=0 if len(columns) < 9 else 90)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    if numbers:
        for row in range(grid.shape[0]):
            for column in range(grid.shape[1]):
                value = float(grid[row, column])
                red, green, blue, _ = drawn.cmap(drawn.norm(value))
                dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
                axes.text(
                    column, row, format(value, numbers), ha="center", va="center",
                    fontsize=8, color="white" if dark else INK,
                )  # fmt: skip
    return drawn


def tokens(
    axes: Axes,
    texts: Sequence[str],
    parts: Sequence[str],
    title: str = "",
    below: Sequence[str] = (),
) -> None:
    """Tokens as boxes with their text; `parts` colours them, `below` is written under each."""
    axes.set_title(title, loc="left")
    axes.axis("off")
    left, line, widest = 0.0, 0, 62.0
    for number, (text, part) in enumerate(zip(texts, parts)):
        shown = text.replace("\n", "↵") or " "
        width = 1.0 + sum(1.9 if ord(letter) > 0x2E7F else 1.0 for letter in shown)
        under = below[number] if number < len(below) else ""
        width = max(width, 1.0 + len(under))
        if left + width > widest:
            left, line = 0.0, line + 1
        y = -1.9 * line
        axes.add_patch(
            Rectangle((left, y), width - 0.2, 1, facecolor=PALE[part], edgecolor=STRONG[part])
        )
        axes.text(left + (width - 0.2) / 2, y + 0.48, shown, ha="center", va="center", fontsize=9)
        axes.text(
            left + (width - 0.2) / 2, y - 0.35, under, ha="center", va="center", fontsize=7.5,
            color=FAINT,
        )  # fmt: skip
        left += width
    axes.set(xlim=(-0.3, widest), ylim=(-1.9 * line - 0.8, 1.2))


def bars(
    axes: Axes,
    values: Mapping[str, float],
    title: str = "",
    unit: str = "",
    parts: Sequence[str] = (),
    number: str = ".0f",
) -> None:
    """One bar for each name, with its value printed above it."""
    names = list(values)
    colours = [STRONG[part] for part in parts] or [LANGUAGE] * len(names)
    drawn = axes.bar(names, list(values.values()), color=colours, width=0.6)
    axes.bar_label(drawn, [format(value, number) for value in values.values()], padding=2)
    axes.set(title=title, ylabel=unit)
    axes.margins(y=0.15)


def curves(  # noqa: PLR0913 (a picture's options, by keyword)
    axes: Axes,
    lines: Mapping[str, Sequence[float] | Tensor],
    title: str = "",
    x: str = "",
    y: str = "",
    at: Sequence[float] | None = None,
    parts: Sequence[str] = (),
) -> None:
    """One line for each name, named in a legend; `at` are the horizontal positions."""
    styles = ("-", "--", "-.", ":")
    for number, (name, values) in enumerate(lines.items()):
        values = torch.as_tensor(values).detach().float().numpy()
        colour = STRONG[parts[number]] if number < len(parts) else None
        axes.plot(
            range(len(values)) if at is None else at, values,
            styles[number % len(styles)], label=name, color=colour,
        )  # fmt: skip
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.legend(frameon=False)
