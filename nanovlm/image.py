"""From a picture on disk to the pixels a vision tower reads: open safely, orient, resize, crop, normalise."""

import io
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image

from nanovlm import archive
from nanovlm import config as configs
from nanovlm.errors import NanoVLMError

# 8192 × 8192: above any 50-megapixel photo, and 256 MiB once decoded (pillow keeps four bytes a pixel).
MAX_PIXELS = 2**26
# Formats decoded inside this process. EPS is absent because pillow starts ghostscript to read it.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

_FILTERS = {filter.name.lower(): filter for filter in (
    Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS, Image.Resampling.NEAREST)}
# EXIF orientation 2 to 8: what makes the picture upright.
_TRANSPOSES = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90), 2))

# Hub settings with one implemented value, which is also the default; then what each processor leaves out of its file.
_HUB_FIXED = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
              "do_convert_rgb": True, "do_pad": False}
_HUB_DEFAULTS = {
    "BitImageProcessor": {
        "size": {"shortest_edge": 224}, "resample": 3, "do_center_crop": True, "crop_size": 224,
        "image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711)},
    "ViTImageProcessor": {
        "size": {"height": 224, "width": 224}, "resample": 2, "do_center_crop": False, "crop_size": 224,
        "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)},
}


@dataclass(frozen=True)
class ImageConfig:
    """How a picture becomes pixels. `height` and `width` are the result's; `mean` and `std` are for values in [0, 1].

    `fit="squash"` resizes the whole picture to height × width, whatever its shape. `fit="crop"` resizes it until its
    shorter side is `shortest_edge`, then cuts height × width out of the middle.
    """

    height: int = 224
    width: int = 224
    fit: str = "squash"
    shortest_edge: int | None = None
    resample: str = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # ImageNet's
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        _require(self.fit in ("squash", "crop"), f"fit must be squash or crop, not {self.fit!r}")
        _require(self.resample in list(_FILTERS), f"resample must be one of {list(_FILTERS)}, not {self.resample!r}")
        _require(self.fit == "crop" or self.shortest_edge is None, "shortest_edge is only for fit = crop")
        for name in ("height", "width") if self.fit == "squash" else ("height", "width", "shortest_edge"):
            size = getattr(self, name)
            _require(type(size) is int and size > 0, f"{name} = {size!r} is not a whole number above 0")
        _require(self.fit == "squash" or self.shortest_edge >= max(self.height, self.width),
                 f"shortest_edge = {self.shortest_edge} is smaller than the {self.height} x {self.width} crop")
        for name in ("mean", "std"):
            values = getattr(self, name)
            _require(isinstance(values, (list, tuple)) and len(values) == 3
                     and all(type(value) in (int, float) and math.isfinite(value) for value in values)
                     and (name == "mean" or min(values) > 0), f"{name} = {values!r} is not three usable numbers")
            object.__setattr__(self, name, tuple(map(float, values)))  # JSON gives lists; equality wants tuples

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ImageConfig":
        """The inverse of `dataclasses.asdict`, also after a trip through JSON. An unknown key is an error."""
        return configs.from_dict(cls, config, "image config")

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "ImageConfig":
        """Read a hub `preprocessor_config.json` of a BitImageProcessor (DINOv2) or a ViTImageProcessor.

        Missing settings take that processor's documented defaults. A setting that is not implemented and an unknown
        key are errors.
        """
        where = "preprocessor_config.json"
        _require(isinstance(config, dict), f"expected a table of settings, found {type(config).__name__}", where)
        known = ["image_processor_type", "feature_extractor_type", *_HUB_FIXED, *_HUB_DEFAULTS["BitImageProcessor"]]
        for key in config:
            if key not in known:
                raise configs.unknown_key(key, known, where)
        kind = str(config.get("image_processor_type") or config.get("feature_extractor_type"))  # the older name
        kind = kind.removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
        _require(kind in _HUB_DEFAULTS, f"image_processor_type is {kind}; can read {list(_HUB_DEFAULTS)}", where)
        settings = _HUB_FIXED | _HUB_DEFAULTS[kind] | {k: value for k, value in config.items() if value is not None}

        configs.require(settings, where, **_HUB_FIXED)
        resample = next((name for name, number in _FILTERS.items() if number == settings["resample"]), None)
        _require(resample is not None, f"resample = {settings['resample']} is not one of 0, 1, 2, 3", where)
        size, crop, do_crop = settings["size"], settings["crop_size"], settings["do_center_crop"]
        if isinstance(size, int):  # in older files: one number, whose meaning is the processor's
            size = {"shortest_edge": size} if kind == "BitImageProcessor" else {"height": size, "width": size}
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
        shape = [sorted(value) if isinstance(value, dict) else None for value in (size, crop)]
        if shape[0] == ["height", "width"] and (not do_crop or crop == size):
            fit = {"fit": "squash", **size}
        else:
            _require(do_crop and shape == [["shortest_edge"], ["height", "width"]],
                     f"size {size} with do_center_crop {do_crop} and crop_size {crop} is not implemented", where)
            fit = {"fit": "crop", **size, **crop}
        return cls(resample=resample, mean=settings["image_mean"], std=settings["image_std"], **fit)


def open_image(source: str | Path | bytes | BinaryIO) -> Image.Image:
    """Open a picture as RGB, turned upright as its EXIF says, transparency on white, the first frame if it moves.

    `source` is a path, also one into a tar file (`images.tar::a.jpg`), a file's bytes, or a seekable binary stream,
    read from its start. Grey of 16 or 32 bits is scaled to 8.

    Raises NanoVLMError, one line naming the source, for anything that is not a complete picture in one of FORMATS of
    at most MAX_PIXELS. Nothing is decoded before the size is known.
    """
    is_path = isinstance(source, (str, Path))
    name = source if is_path else getattr(source, "name", "image in memory")
    try:
        if not is_path:
            return _decode(io.BytesIO(source) if isinstance(source, bytes) else source)
        if archive.is_member(source):
            return _decode(io.BytesIO(archive.read_member(source)))
        if not Path(source).is_file():  # a device or a pipe could be read for ever
            raise NanoVLMError("not a file" if Path(source).exists() else "no such file")
        with Path(source).open("rb") as file:
            return _decode(file)
    except NanoVLMError as error:
        reason = str(error)
    except Image.UnidentifiedImageError:
        reason = f"not an image, or cut off in its header; can read {', '.join(FORMATS)}"
    except Image.DecompressionBombError:
        reason = f"more pixels than the limit of {MAX_PIXELS:,}; make the image smaller first"
    except Exception as error:  # on broken files pillow raises nearly every built-in exception there is
        reason = f"cannot read the image: {' '.join(str(error).split()) or type(error).__name__}"
    raise NanoVLMError(f"{name}: {reason}")


def _decode(file: BinaryIO) -> Image.Image:
    file.seek(0)
    if not file.read(1):
        raise NanoVLMError("the file is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pillow warns about odd metadata, and about sizes, which are checked here
        image = Image.open(file, formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise NanoVLMError(f"{image.width} x {image.height} is more pixels than the limit of {MAX_PIXELS:,}; "
                               "make the image smaller first")
        image.load()
        try:
            transpose = _TRANSPOSES.get(image.getexif().get(ExifTags.Base.Orientation))
        except Exception:  # damaged EXIF beside a whole picture: viewers show it unturned, and so do we
            transpose = None
        image = _to_rgb(image)
        return image if transpose is None else image.transpose(transpose)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey_to_8_bit(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _grey_to_8_bit(image: Image.Image) -> Image.Image:
    """Scale grey of more than 8 bits, which pillow's own `convert` would clip at 255.

    White is 65535 in 16-bit files. 32-bit files do not say what white is: it is taken as the first of 1, 255, 65535
    and the largest value that holds every value. Black is 0, or the smallest value if that is negative.
    """
    values = np.array(image, dtype=np.float32)
    low, high = min(0.0, float(values.min())), float(values.max())
    if not math.isfinite(high - low):
        raise NanoVLMError("the image holds NaN or infinite values")
    is_16_bit = image.mode != "F" and (image.mode != "I" or image.format == "PPM")  # a 16-bit PPM opens as "I"
    white = 65535.0 if is_16_bit else next(level for level in (1.0, 255.0, 65535.0, high) if high <= level)
    grey = ((values - low) * (255 / (white - low)) + 0.5).astype(np.uint8)
    if isinstance(image.info.get("transparency"), int):  # a PNG may name one grey that is see-through
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def preprocess(image: Image.Image, config: ImageConfig) -> torch.Tensor:
    """Resize, crop and normalise an RGB picture: float32 (3, height, width), (value / 255 − mean) / std."""
    box = (0.0, 0.0, float(image.width), float(image.height))
    if config.fit == "crop":
        width, height = (config.shortest_edge * side // min(image.size) for side in image.size)  # the resized picture
        left, top = (width - config.width) // 2, (height - config.height) // 2
        # Resize only what the crop keeps: the same pixels for less work, and a 1 × 5000 picture needs no giant copy.
        # (Only "nearest" can differ from resizing everything first: in a column or row exactly between two pixels.)
        box = (left * image.width / width, top * image.height / height,
               (left + config.width) * image.width / width, (top + config.height) * image.height / height)
    resized = image.resize((config.width, config.height), _FILTERS[config.resample], box)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)  # (3, height, width)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255).sub_(mean).div_(std)


def _require(condition: bool, problem: str, where: str = "image config") -> None:
    if not condition:
        raise NanoVLMError(f"{where}: {problem}")
