"""The settings by which an image becomes pixels."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image

from nanovlm.errors import quoted
from nanovlm.utils.config import LIMITS, check, check_numbers

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
        _check(self.fit in FITS, f"fit must be one of {', '.join(FITS)}, not {quoted(self.fit)}")
        _check(
            self.resample in list(FILTERS),
            f"resample must be one of {list(FILTERS)}, not {quoted(self.resample)}",
        )
        for name, fit in (("shortest_edge", "crop"), ("max_tiles", "tiles")):
            is_unused = self.fit != fit
            _check(
                (getattr(self, name) is None) == is_unused,
                f"{name} is for fit = {fit}, and only for it",
            )
        check_numbers(self)
        if self.shortest_edge is not None:
            _check(
                self.shortest_edge >= max(self.height, self.width),
                f"shortest_edge = {self.shortest_edge} is smaller than "
                f"the {self.height} x {self.width} crop",
            )
        if (max_tiles := self.max_tiles) is not None:
            _check(
                max_tiles * self.height <= LIMITS["height"][1],
                f"{max_tiles} tiles of {self.height} pixels are more than an image of "
                f"{LIMITS['height'][1]} pixels",
            )
            _check(
                self.height == self.width,
                f"tiles of {self.height} x {self.width} are not implemented, only square ones",
            )
            _check(max_tiles > 1, "max_tiles = 1 cuts nothing; use fit = squash")
        for name, low, high in (("mean", 0, 1), ("std", 0.001, 10)):
            numbers = getattr(self, name)
            _check(
                _are_numbers(numbers, low, high),
                f"{name} = {quoted(numbers)} is not three usable numbers, from {low} to {high}",
            )
        for name in ("mean", "std"):  # JSON gives lists, and equality needs tuples
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))

    @property
    def max_tiles_per_image(self) -> int:
        """The most tiles of an image, the whole image included: those of a square one."""
        return 1 if self.max_tiles is None else self.max_tiles**2 + 1


def _are_numbers(values: Any, low: float, high: float) -> bool:
    """Whether `values` are three numbers from `low` to `high`."""
    return (
        isinstance(values, (list, tuple))
        and len(values) == 3
        and all(type(value) in (int, float) and low <= value <= high for value in values)
    )
