"""From the tiles that the vision encoder gets to places of an image, and back."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nanovlm.inputs.image_config import ImageConfig


def join_tiles(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """The maps of an image's tiles, (rows · columns + 1, h, w), as one: (rows · h, columns · w).

    The last is that of the whole image. What is in its places is spread evenly over theirs in the
    other tiles, so the sum stays. An image that is not cut, with rows = columns = 0, has no other.
    """
    whole = tiles[-1]
    if not rows:
        return whole
    cut = torch.cat([torch.cat(list(row), dim=1) for row in tiles[:-1].split(columns)])
    spread = whole.repeat_interleave(rows, dim=0).repeat_interleave(columns, dim=1)
    return cut + spread / (rows * columns)


def seen_part(width: int, height: int, config: ImageConfig) -> tuple[float, float, float, float]:
    """What of an image reaches the vision encoder: left, top, right and bottom in its pixels.

    That is all of it but for `fit="crop"`.
    """
    if config.shortest_edge is None:
        return 0, 0, width, height
    scale = min(width, height) / config.shortest_edge
    left, top = (width - config.width * scale) / 2, (height - config.height * scale) / 2
    return left, top, width - left, height - top


def spread(places: Tensor, width: int, height: int, config: ImageConfig) -> np.ndarray:
    """Values of places, (rows, columns), at each pixel of the image: (height, width).

    What the vision encoder does not get is 0.
    """
    left, top, right, bottom = seen_part(width, height, config)
    rows, columns = places.shape
    row = np.floor((np.arange(height) + 0.5 - top) / (bottom - top) * rows).astype(int)
    column = np.floor((np.arange(width) + 0.5 - left) / (right - left) * columns).astype(int)
    inside = ((row >= 0) & (row < rows))[:, None] & ((column >= 0) & (column < columns))
    values = places.numpy()[row.clip(0, rows - 1)][:, column.clip(0, columns - 1)]
    return np.where(inside, values, 0)


def blank_out(image: Image.Image, places: Tensor, config: ImageConfig) -> Image.Image:
    """The image with the mean colour at the places that are true, (rows, columns)."""
    pixels = np.array(image)
    colour = [round(255 * value) for value in config.mean]
    pixels[spread(places, *image.size, config).astype(bool)] = colour
    return Image.fromarray(pixels)
