"""The words that a run with `--objective words` finds in a few held-out images, and where.

samples.jsonl   one line per image and validation: step, where, its words, those of its captions
samples.png     one row per image, after the last validation: the image as the vision encoder gets
                it, then its words, each with the places of the visual tokens it was found in
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from nanovlm.data.batches import Batches, BatchOptions
from nanovlm.data.words import WordBatch, WordEncoder
from nanovlm.explain.places import join_tiles
from nanovlm.inputs.image import image_pixels, image_size, open_image, tile_grid
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.model.projector import ResamplerProjector
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.monitor.samples import FAINT, OTHER, RIGHT, Samples, wrap
from nanovlm.training.objectives.words import Words
from nanovlm.utils.figures import plt, save_figure

SHOWN = 12  # words of the captions
CELL, TEXT = 1.45, 0.4  # inches: the side of an image, and the height of the text around it
COLUMNS, LINES = 20, 2  # of text below an image


@dataclass(frozen=True)
class FoundWord:
    """A word that the model names for an image."""

    text: str
    probability: float
    said: bool  # whether a caption has it
    places: Tensor  # (visual tokens,) the part of each in finding it; they add up to 1


@dataclass(frozen=True)
class Row:
    """What is drawn of an image."""

    pixels: np.ndarray  # (H, W, 3)
    said: str  # words of its captions
    words: list[FoundWord]
    maps: list[np.ndarray | None]  # of each word: a number for each place of the image


class WordSamples(Samples):
    """Words found in a few of the records of `validation`, spread evenly."""

    def __init__(self, run: Path, validation: Batches, objective: Words, start_step: int) -> None:
        super().__init__(run, validation.records, start_step)
        options = BatchOptions(len(self.watched), validation.options.max_length, shuffle=False)
        self.objective, self.encoder = objective, validation.encoder
        self.batches = Batches(self.watched, self.encoder, options, validation.features)
        self.rows: list[Row] = []

    @torch.no_grad()
    def new_lines(self, model: VisionLanguageModel, step: int) -> list[dict[str, Any]]:
        """Name the words of each image, and keep for `draw` where they were found."""
        assert isinstance(self.encoder, WordEncoder)
        loaded = self.batches[0]
        self.rows, lines = [], []
        if loaded.batch is None:
            return []
        batch = loaded.batch.to(self.objective.bias.device)
        assert isinstance(batch, WordBatch)
        texts = self.encoder.vocabulary.texts(model.tokenizer)
        images = {record.where: record.images[0] for record in self.watched}
        similarities = self.objective.similarities(model, batch)
        for where, of_image, counts in zip(loaded.records, similarities, batch.counts):
            probabilities = self.objective.logits(of_image).sigmoid()  # (W,)
            words = [
                FoundWord(
                    texts[word],
                    float(probabilities[word]),
                    bool(counts[word] > 0),
                    of_image[:, word].softmax(dim=0).cpu(),
                )
                for word in self.objective.found(probabilities).tolist()
            ]
            best = counts.topk(min(SHOWN, int((counts > 0).sum()))).indices.tolist()
            said, named = " ".join(texts[i] for i in best), " ".join(word.text for word in words)
            line = {"step": step, "where": where, "prompt": "", "answer": named, "reference": said}
            lines.append(line)
            maps = [place_map(word.places, model, images[where]) for word in words]
            self.rows.append(Row(_seen(images[where], model.config.image), said, words, maps))
        return lines

    def draw(self) -> None:
        """Draw `samples.png` from the words found last; of several images of a record the first."""
        if self.rows:
            draw_words(self.run / "samples.png", self.rows)


def place_map(places: Tensor, model: VisionLanguageModel, path: Path) -> np.ndarray | None:
    """The parts of an image's visual tokens where their patches are, (h, w) with the sum 1.

    Those of the image's tiles, and of the whole image after them, are added. None where visual
    tokens have no place: learned queries attend to all patches.
    """
    side = math.isqrt(model.image_length)
    queries = isinstance(model.projector, ResamplerProjector)
    if queries or model.config.vision_encoder.num_queries or side**2 != model.image_length:
        return None
    rows, columns = tile_grid(*image_size(path), model.config.image)
    tiles = places[: (rows * columns + 1) * side**2].view(-1, side, side)
    return join_tiles(tiles, rows, columns).numpy()


def draw_words(path: Path, rows: Sequence[Row], dpi: int = 110) -> None:
    """Draw each image, with the words of its captions below, and then the words found in it.

    A word is green if a caption has it. Where it was found the image is bright.
    """
    columns = 1 + max(len(row.words) for row in rows)
    width, height = CELL * columns, (CELL + TEXT) * len(rows)
    with plt.rc_context({"font.size": 8, "text.parse_math": False}):
        figure = plt.figure(figsize=(width, height), facecolor="white")
        for number, row in enumerate(rows):
            bottom = 1 - ((CELL + TEXT) * (number + 1) - 0.22) / height
            axes = [
                figure.add_axes(
                    (
                        (column + 0.03) * CELL / width,
                        bottom,
                        0.94 * CELL / width,
                        0.94 * CELL / height,
                    )
                )
                for column in range(columns)
            ]
            _draw_row(axes, row)
        save_figure(figure, path, dpi)


def _draw_row(axes: Sequence[Axes], row: Row) -> None:
    for each in axes:
        each.axis("off")
    axes[0].imshow(row.pixels)
    below = wrap(row.said, COLUMNS * len(axes), 1)
    axes[0].text(0, -0.04, below, transform=axes[0].transAxes, va="top", color=FAINT)
    height, width, _ = row.pixels.shape
    for each, word, places in zip(axes[1:], row.words, row.maps):
        title = f"{word.text} {word.probability:.2f}"
        each.set_title(title, fontsize=9, pad=2, color=RIGHT if word.said else OTHER)
        if places is None:
            continue
        light = (places / places.max())[..., None]  # (h, w, 1)
        light = np.kron(light, np.ones((-(-height // len(light)), -(-width // light.shape[1]), 1)))
        each.imshow(row.pixels * (0.15 + 0.85 * light[:height, :width]))


def _seen(path: Path, config: ImageConfig) -> np.ndarray:
    """The image as the vision encoder gets it, (H, W, 3) in [0, 1]; the whole one if it is cut."""
    pixels = image_pixels(open_image(path), config)[-1]  # (3, H, W)
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.mean, config.std))
    return (pixels * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
