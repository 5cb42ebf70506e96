"""The facts about each image: size, format, digests, and what it looks like from afar.

An image is opened as training opens it, so what fails here fails there. `gradients` is the
difference hash of rows and columns (dHash: N. Krawetz, "Kind of Like That", 2013), which says
where an image gets brighter; `colors` is the image at 8 × 8 pixels.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from data_tools.pack_tar import read_image_file
from nanovlm.data.sequences import chunks
from nanovlm.data.workers import Loading, prepare_ahead
from nanovlm.errors import NanoVLMError
from nanovlm.inputs.image import open_image
from nanovlm.utils.sniff import FIRST_BYTES, what_is

SIDE = 8  # of the grids that say what an image looks like
AT_ONCE = 16  # images that a worker hands over together
BLANK = 4  # of 255: between the least and the most of a colour
DIGEST = 16  # bytes of a SHA-256 that are kept: two images in 10^15 would share them by chance


class ImageFacts(NamedTuple):
    """What is known of an image; of one that cannot be read, the error alone."""

    error: str = ""
    width: int = 0  # in pixels, upright
    height: int = 0
    format: str = ""
    file_digest: bytes = b""
    pixel_digest: bytes = b""  # of its size and its RGB pixels
    gradients: bytes = b""  # 2 · SIDE² bits
    colors: bytes = b""  # SIDE² RGB pixels
    is_blank: bool = False  # all pixels are equal, but for what compression adds


def look_at_image(path: Path) -> ImageFacts:
    """Open an image and gather its facts."""
    try:
        data = read_image_file(path)
        image = open_image(data)
    except NanoVLMError as error:
        reason = str(error).removeprefix("image in memory: ").removeprefix(f"{path}: ")
        return ImageFacts(error=reason)
    pixels = np.asarray(image)
    size = f"{image.width} {image.height} ".encode()
    colors = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    return ImageFacts(
        width=image.width,
        height=image.height,
        format=_format(data),
        file_digest=hashlib.sha256(data).digest()[:DIGEST],
        pixel_digest=hashlib.sha256(size + pixels.tobytes()).digest()[:DIGEST],
        gradients=_gradients(image),
        colors=colors.tobytes(),
        is_blank=int(np.ptp(pixels, axis=(0, 1)).max()) <= BLANK,
    )


def look_at_images(paths: Sequence[Path], workers: int) -> Iterator[ImageFacts]:
    """The facts about each image, in order, whatever the number of `workers`."""
    groups = _Groups(chunks(list(paths), AT_ONCE))
    for facts in prepare_ahead(groups, 0, len(groups.groups), Loading(workers)):
        yield from facts


class _Groups(Dataset):
    """Images a few at a time, which costs less to hand over."""

    def __init__(self, groups: list[list[Path]]) -> None:
        self.groups = groups

    def __getitem__(self, number: int) -> list[ImageFacts]:
        return [look_at_image(path) for path in self.groups[number]]


def _gradients(image: Image.Image) -> bytes:
    """One bit for each pair of neighbours in a row, then in a column: whether it gets brighter."""
    small = image.convert("L").resize((SIDE + 1, SIDE + 1), Image.Resampling.BOX)
    grey = np.asarray(small, dtype=np.int16)
    rows = grey[:-1, 1:] > grey[:-1, :-1]
    columns = grey[1:, :-1] > grey[:-1, :-1]
    return np.packbits(np.stack((rows, columns))).tobytes()


def _format(data: bytes) -> str:
    """The name of an image's format: JPEG, PNG, WebP, …"""
    words = (what_is(data[:FIRST_BYTES]) or "PPM image").split()
    return words[-2]
