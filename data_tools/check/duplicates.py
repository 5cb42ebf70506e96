"""Copies of images: the same pixels, or nearly so, found without comparing all pairs.

Two images are nearly the same if their difference hashes differ in at most MAX_BITS bits, no cell
of the two at 8 × 8 pixels differs by more than MAX_COLOR, and their shapes are alike. That finds
what was resized, converted or compressed again; a crop or another exposure is another image.

The hash is cut into eight bands of 16 bits. Of images that differ in few bits, some two bands are
nearly always equal (always, for up to six bits), so only images that share two bands are compared:
they are sorted by each pair of bands, and each is compared with its next NEIGHBOURS at most.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from data_tools.check.images import ImageFacts

MAX_BITS = 12  # of 128: 99 % of images at JPEG quality 20, or at half the size, are within it
MAX_COLOR = 16  # of 255
MAX_STRETCH = 1.03  # between the shapes of two images
NEIGHBOURS = 50
BANDS = 8
BLOCK = 2**16  # pairs that are compared at once
_BITS = np.array([number.bit_count() for number in range(256)], dtype=np.uint8)

Array = NDArray[np.integer]


def copies(facts: Sequence[ImageFacts]) -> tuple[dict[int, int], dict[int, int]]:
    """The images that are copies of an earlier one, and those that are nearly so.

    Returns two maps, number of the image → number of the earlier one, which is no copy itself. An
    image is in one of them at most; one that could not be read, or has one colour, is in neither of
    them as nearly the same.
    """
    exact: dict[int, int] = {}
    first: dict[bytes, int] = {}
    for number, image in enumerate(facts):
        if not image.error:
            earlier = first.setdefault(image.pixel_digest, number)
            if earlier != number:
                exact[number] = earlier
    distinct = [number for number in first.values() if not facts[number].is_blank]
    near: dict[int, int] = {}
    for earlier, later in _near_pairs([facts[number] for number in distinct]):
        earlier, later = distinct[earlier], distinct[later]
        if earlier not in near and later not in near:
            near[later] = earlier
    near |= {number: near[earlier] for number, earlier in exact.items() if earlier in near}
    return {n: e for n, e in exact.items() if n not in near}, near


def _near_pairs(facts: Sequence[ImageFacts]) -> list[tuple[int, int]]:
    """Pairs of images that are nearly the same, (earlier, later), sorted by the later one."""
    if len(facts) < 2:
        return []
    hashes = np.array([np.frombuffer(image.gradients, np.uint8) for image in facts])
    colors = np.array([np.frombuffer(image.colors, np.uint8) for image in facts])
    shapes = np.array([image.width / image.height for image in facts])
    bands = np.ascontiguousarray(hashes).view(np.uint16).astype(np.uint32)  # (N, BANDS)
    brightness = colors.mean(axis=1)
    found: list[Array] = []
    for one, other in combinations(range(BANDS), 2):
        keys = bands[:, one] << 16 | bands[:, other]
        order = np.lexsort((brightness, keys))
        for step in range(1, min(NEIGHBOURS + 1, len(order))):
            alike = keys[order[:-step]] == keys[order[step:]]
            if not alike.any():
                break
            alike &= brightness[order[step:]] - brightness[order[:-step]] <= MAX_COLOR
            pairs = np.stack((order[:-step][alike], order[step:][alike]), axis=1)
            found += [
                part[_are_near(part, hashes, colors, shapes)]
                for part in np.split(pairs, range(BLOCK, len(pairs), BLOCK))
            ]
    pairs = np.unique(np.sort(np.concatenate(found), axis=1), axis=0) if found else found
    return sorted(((int(a), int(b)) for a, b in pairs), key=lambda pair: (pair[1], pair[0]))


def _are_near(pairs: Array, hashes: Array, colors: Array, shapes: NDArray) -> NDArray[np.bool_]:
    """Whether the images of each pair are nearly the same: (M, 2) → (M,)."""
    left, right = pairs.T
    near = _BITS[hashes[left] ^ hashes[right]].sum(axis=1) <= MAX_BITS
    stretch = shapes[left] / shapes[right]
    near &= (stretch <= MAX_STRETCH) & (stretch >= 1 / MAX_STRETCH)
    rest = np.flatnonzero(near)
    difference = colors[left[rest]].astype(np.int16) - colors[right[rest]]
    near[rest] = np.abs(difference).max(axis=1, initial=0) <= MAX_COLOR
    return near
