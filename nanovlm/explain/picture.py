"""One picture of an answer: the image once for each word, bright where the word came from."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from nanovlm.explain.attribution import MAX_WORDS, ExplainedWord, explain
from nanovlm.explain.places import spread
from nanovlm.inputs.batch import Batch
from nanovlm.inputs.image import resized_within
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.utils.console import say
from nanovlm.utils.figures import plt, save_figure
from nanovlm.utils.outputs import new_file

COLUMNS = 8  # of the picture, words or the image itself
# In inches: the side of an image, and the height of the text above it.
CELL, TEXT, MARGIN = 1.3, 0.42, 0.08
PIXELS = 320  # longer side of an image in the picture
CHARACTERS = 14  # of a word
FAINT, DARK, GREY = 0.22, "#24292f", "#6e7781"


def draw_answer(
    path: Path,
    model: VisionLanguageModel,
    prompt: Batch,
    images: Sequence[Image.Image],
    answer: Sequence[int],
) -> None:
    """Explain an answer (`explain`), draw it into a new file, and say on stderr where that is."""
    words = explain(model, prompt, images, answer)
    with new_file(path) as temporary:
        draw_explained(temporary, images, words, model.config.image)
    note = f" (the first {MAX_WORDS} words)" if len(words) == MAX_WORDS else ""
    say(f"where the words came from is drawn in {path}{note}")


def draw_explained(
    path: Path, images: Sequence[Image.Image], words: Sequence[ExplainedWord], config: ImageConfig
) -> None:
    """Draw the images, and then each word above the images, as a PNG.

    The brighter a place, the larger its part; the brightest one of a word is as bright as the share
    of the word's probability that is gone without the images. Below the word are the probabilities
    without and with them.
    """
    images = [resized_within(image, PIXELS) for image in images]
    columns = min(COLUMNS, 1 + len(words))
    lines = -(-(1 + len(words)) // columns)
    line_height = TEXT + CELL * len(images)
    width, height = CELL * columns + MARGIN, line_height * lines + MARGIN
    with plt.rc_context({"font.size": 9, "text.parse_math": False}):
        figure = plt.figure(figsize=(width, height), facecolor="white")
        for number, word in enumerate([None, *words]):
            line, column = divmod(number, columns)
            for row, image in enumerate(images):
                left, below = MARGIN + CELL * column, line_height * line + TEXT + CELL * (row + 1)
                side = CELL - MARGIN
                place = left / width, 1 - below / height, side / width, side / height
                axes = figure.add_axes(place, anchor="N")
                shown = np.asarray(image)
                if word is not None:
                    shown = _lit(shown, spread(word.maps[row], *image.size, config), word)
                axes.imshow(shown)
                axes.axis("off")
                if row == 0 and word is not None:
                    _write(axes, word)
        save_figure(figure, path, dpi=120)


def _lit(pixels: np.ndarray, parts: np.ndarray, word: ExplainedWord) -> np.ndarray:
    """The image (H, W, 3) on white, the stronger the larger the part of a place, (H, W)."""
    largest = max(float(places.max()) for places in word.maps) or 1.0
    light = FAINT + (1 - FAINT) * word.from_images * parts[..., None] / largest
    return (255 - (255 - pixels) * light).astype(np.uint8)


def _write(axes: Axes, word: ExplainedWord) -> None:
    """The word, and its probabilities, above the first image."""
    text = word.text
    if len(text) > CHARACTERS:
        text = text[: CHARACTERS - 1] + "…"
    chances = f"{100 * word.blank:.0f} → {100 * word.probability:.0f} %"
    for line, above, size, colour in ((text, 12, 10, DARK), (chances, 3, 7, GREY)):
        axes.annotate(
            line,
            (0.5, 1),
            (0, above),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="center",
            fontsize=size,
            color=colour,
        )
