"""How a picture becomes pixels: the settings, and what hub files say of them."""

import math
from dataclasses import dataclass
from functools import partial

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
_check = partial(check, where="image config")
FITS = ("squash", "crop", "tiles")


@dataclass(frozen=True)
class ImageConfig:
    """How a picture becomes pixels. `height` and `width` are the result's; `mean` and `std` are for values in [0, 1].

    `fit="squash"` resizes the whole picture to height × width, whatever its shape. `fit="crop"` resizes it until its
    shorter side is `shortest_edge`, then cuts height × width out of the middle. `fit="tiles"` makes several pictures of
    one image: it is enlarged or shrunk until its longer side is `max_tiles` tiles of height × width and the shorter one
    as many as hold it, and cut into these; the whole, squashed, comes last (Idefics3: Laurençon et al. 2024).
    """

    height: int = 224
    width: int = 224
    fit: str = "squash"
    shortest_edge: int | None = None
    resample: str = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # ImageNet's
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    max_tiles: int | None = None

    def __post_init__(self) -> None:
        _check(self.fit in FITS, f"fit must be one of {', '.join(FITS)}, not {self.fit!r}")
        _check(
            self.resample in list(FILTERS),
            f"resample must be one of {list(FILTERS)}, not {self.resample!r}",
        )
        used = ["height", "width"]
        for name, fit in (("shortest_edge", "crop"), ("max_tiles", "tiles")):
            _check(
                self.fit == fit or getattr(self, name) is None, f"{name} is only for fit = {fit}"
            )
            used += [name] if self.fit == fit else []
        for name in used:
            size = getattr(self, name)
            _check(
                type(size) is int and size > 0, f"{name} = {size!r} is not a whole number above 0"
            )
        _check(
            self.fit != "crop" or self.shortest_edge >= max(self.height, self.width),
            f"shortest_edge = {self.shortest_edge} is smaller than the {self.height} x {self.width} crop",
        )
        _check(
            self.fit != "tiles" or self.height == self.width,
            f"tiles of {self.height} x {self.width} are not implemented, only square ones",
        )
        _check(
            self.fit != "tiles" or self.max_tiles > 1,
            "max_tiles = 1 cuts nothing; use fit = squash",
        )
        for name in ("mean", "std"):
            values = getattr(self, name)
            _check(
                isinstance(values, (list, tuple))
                and len(values) == 3
                and all(type(value) in (int, float) and math.isfinite(value) for value in values)
                and (name == "mean" or min(values) > 0),
                f"{name} = {values!r} is not three usable numbers",
            )
            object.__setattr__(
                self, name, tuple(map(float, values))
            )  # JSON gives lists; equality wants tuples

    @property
    def max_tiles_per_image(self) -> int:
        """The most pictures that the eyes see of one image: those of a square one."""
        return self.max_tiles**2 + 1 if self.fit == "tiles" else 1
