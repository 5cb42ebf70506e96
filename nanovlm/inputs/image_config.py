"""The settings by which an image becomes pixels."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image

from nanovlm.utils.config import check

FILTERS = {
    filter.name.lower(): filter
    for filter in (
        Image.Resampling.BICUBIC,
        Image.Resampling.BILINEAR,
        Image.Resampling.LANCZOS,
        Image.Resampling.NEAREST,
    )
}
FITS = ("squash", "crop", "tiles")
_check = partial(check, where="image config")


@dataclass(frozen=True)
class ImageConfig:
    """How an image becomes `height` × `width` pixels.

    It is resized with the filter `resample`, and normalised with `mean` and `std`, which are for
    values in [0, 1].

    - `fit="squash"` resizes the whole image to height × width, whatever its shape.
    - `fit="crop"` resizes it until its shorter side is `shortest_edge`, then cuts height × width
      out of the middle.
    - `fit="tiles"` cuts it into tiles of height × width, after resizing it so that its longer side
      is `max_tiles` tiles and its shorter side the fewest that hold it. The whole image, squashed,
      comes after them as one more tile (Idefics3: Laurençon et al. 2024).
    """

    height: int = 224
    width: int = 224
    fit: str = "squash"
    shortest_edge: int | None = None  # for fit="crop" only
    resample: str = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # ImageNet's
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    max_tiles: int | None = None  # for fit="tiles" only

    def __post_init__(self) -> None:
        _check(self.fit in FITS, f"fit must be one of {', '.join(FITS)}, not {self.fit!r}")
        _check(
            self.resample in list(FILTERS),
            f"resample must be one of {list(FILTERS)}, not {self.resample!r}",
        )
        for name, fit in (("shortest_edge", "crop"), ("max_tiles", "tiles")):
            is_unused = self.fit != fit
            _check(not is_unused or getattr(self, name) is None, f"{name} is only for fit = {fit}")
        _check_size("height", self.height)
        _check_size("width", self.width)
        if self.fit == "crop":
            _check(
                _check_size("shortest_edge", self.shortest_edge) >= max(self.height, self.width),
                f"shortest_edge = {self.shortest_edge} is smaller than "
                f"the {self.height} x {self.width} crop",
            )
        if self.fit == "tiles":
            max_tiles = _check_size("max_tiles", self.max_tiles)
            _check(
                self.height == self.width,
                f"tiles of {self.height} x {self.width} are not implemented, only square ones",
            )
            _check(max_tiles > 1, "max_tiles = 1 cuts nothing; use fit = squash")
        _check(_are_numbers(self.mean), f"mean = {self.mean!r} is not three usable numbers")
        _check(
            _are_numbers(self.std) and min(self.std) > 0,
            f"std = {self.std!r} is not three usable numbers",
        )
        for name in ("mean", "std"):  # JSON gives lists, and equality needs tuples
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))

    @property
    def max_tiles_per_image(self) -> int:
        """The most tiles of an image, the whole image included: those of a square one."""
        return 1 if self.max_tiles is None else self.max_tiles**2 + 1


def _check_size(name: str, size: Any) -> int:
    _check(type(size) is int and size > 0, f"{name} = {size!r} is not a whole number above 0")
    return size


def _are_numbers(values: Any) -> bool:
    """Whether `values` are three finite numbers."""
    return (
        isinstance(values, (list, tuple))
        and len(values) == 3
        and all(type(value) in (int, float) and math.isfinite(value) for value in values)
    )
