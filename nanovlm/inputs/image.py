"""From a picture on disk to the pixels a vision tower reads: open safely, orient, resize, crop or tile, normalise."""

import io
import math
import struct
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image

from nanovlm.errors import NanoVLMError
from nanovlm.inputs import archive
from nanovlm.inputs.image_config import FILTERS, ImageConfig

T = TypeVar("T")

# 8192 × 8192: above any 50-megapixel photo, and 256 MiB once decoded (pillow keeps four bytes a pixel).
MAX_PIXELS = 2**26
# Formats decoded inside this process. EPS is absent because pillow starts ghostscript to read it.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# EXIF orientation 2 to 8: what makes the picture upright.
_TRANSPOSES = dict(
    enumerate(
        (
            Image.Transpose.FLIP_LEFT_RIGHT,
            Image.Transpose.ROTATE_180,
            Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE,
            Image.Transpose.ROTATE_270,
            Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
        ),
        2,
    )
)
_SIDEWAYS = [_TRANSPOSES[orientation] for orientation in (5, 6, 7, 8)]


def open_image(source: str | Path | bytes | BinaryIO) -> Image.Image:
    """Open a picture as RGB, turned upright as its EXIF says, transparency on white, the first frame if it moves.

    `source` is a path, also one into a tar file (`images.tar::a.jpg`), a file's bytes, or a seekable binary stream,
    read from its start. Grey of 16 or 32 bits is scaled to 8.

    Raises NanoVLMError, one line naming the source, for anything that is not a complete picture in one of FORMATS of
    at most MAX_PIXELS. Nothing is decoded before the size is known.
    """
    return _read(source, _decode)


def image_size(source: str | Path | bytes | BinaryIO) -> tuple[int, int]:
    """(width, height) of what `open_image` will give, read from the file's header: the rest may yet be damaged."""
    return _read(source, _upright_size)


def _read(source: str | Path | bytes | BinaryIO, read: Callable[[BinaryIO], T]) -> T:
    """What `read` makes of a picture's file, or an error of one line."""
    is_path = isinstance(source, (str, Path))
    name = source if is_path else getattr(source, "name", "image in memory")
    try:
        if not is_path:
            return read(io.BytesIO(source) if isinstance(source, bytes) else source)
        if archive.is_member(source):
            return read(io.BytesIO(archive.read_member(source)))
        if not Path(source).is_file():  # a device or a pipe could be read for ever
            raise NanoVLMError("not a file" if Path(source).exists() else "no such file")
        with Path(source).open("rb") as file:
            return read(file)
    except NanoVLMError as error:
        reason = str(error)
    except Image.UnidentifiedImageError:
        reason = f"not an image, or cut off in its header; can read {', '.join(FORMATS)}"
    except Image.DecompressionBombError:
        reason = f"more pixels than the limit of {MAX_PIXELS:,}; make the image smaller first"
    except (
        Exception
    ) as error:  # on broken files pillow raises nearly every built-in exception there is
        reason = f"cannot read the image: {' '.join(str(error).split()) or type(error).__name__}"
    raise NanoVLMError(f"{name}: {reason}")


def _open(file: BinaryIO) -> Image.Image:
    """The picture with nothing decoded yet."""
    file.seek(0)
    if not file.read(1):
        raise NanoVLMError("the file is empty")
    image = Image.open(file, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise NanoVLMError(
            f"{image.width} x {image.height} is more pixels than the limit of {MAX_PIXELS:,}; "
            "make the image smaller first"
        )
    return image


def _decode(file: BinaryIO) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # pillow warns about odd metadata, and about sizes, which are checked here
        image = _open(file)
        image.load()
        transpose = _transpose(image.getexif)
        image = _to_rgb(image)
        return image if transpose is None else image.transpose(transpose)


def _upright_size(file: BinaryIO) -> tuple[int, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _open(file)
        size, getexif = image.size, image.getexif
        if (
            image.format == "TIFF"
        ):  # pillow turns it by itself, some versions this size already: these are the file's
            size = image.tag_v2[ExifTags.Base.ImageWidth], image.tag_v2[ExifTags.Base.ImageLength]
        elif image.format == "PNG" and not _png_tells_later(file):
            getexif = partial(
                Image.Image.getexif, image
            )  # a PNG's own decodes the picture to look behind it
        return size[::-1] if _transpose(getexif) in _SIDEWAYS else size


def _png_tells_later(file: BinaryIO) -> bool:
    """Whether a PNG has text or EXIF behind its pixels, where its orientation may stand."""
    position, pixels_seen, found = file.tell(), False, False
    file.seek(8)  # the signature; then each chunk's length, name, data and checksum
    while not found and len(start := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", start)
        pixels_seen |= name == b"IDAT"
        found = pixels_seen and name in (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
        file.seek(length + 4, io.SEEK_CUR)
    file.seek(position)
    return found


def _transpose(getexif: Callable[[], Image.Exif]) -> Image.Transpose | None:
    """What makes a picture upright."""
    try:
        return _TRANSPOSES.get(getexif().get(ExifTags.Base.Orientation))
    except Exception:  # damaged EXIF beside a whole picture: viewers show it unturned, and so do we
        return None


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
    is_16_bit = image.mode != "F" and (
        image.mode != "I" or image.format == "PPM"
    )  # a 16-bit PPM opens as "I"
    white = (
        65535.0
        if is_16_bit
        else next(level for level in (1.0, 255.0, 65535.0, high) if high <= level)
    )
    grey = ((values - low) * (255 / (white - low)) + 0.5).astype(np.uint8)
    if isinstance(
        image.info.get("transparency"), int
    ):  # a PNG may name one grey that is see-through
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def tile_grid(width: int, height: int, config: ImageConfig) -> tuple[int, int]:
    """(rows, columns) of the tiles that an image of this size is cut into; (0, 0) where it is not cut."""
    if config.fit != "tiles":
        return 0, 0
    width, height = _longest(width, height, config.max_tiles * config.width)
    return math.ceil(height / config.height), math.ceil(width / config.width)


def image_pixels(image: Image.Image, config: ImageConfig) -> torch.Tensor:
    """All pictures that the eyes see of an RGB image: float32 (n, 3, height, width); n is 1 where it is not cut.

    Tiles come row by row, and the whole image after them. It is resized in the steps of the reference (Idefics3), each
    rounded to whole values, so that the pixels are the same.
    """
    rows, columns = tile_grid(*image.size, config)
    pictures = []
    if rows:
        width, height = config.width, config.height
        image = image.resize(
            _longest(*image.size, config.max_tiles * width), FILTERS[config.resample]
        )
        image = image.resize((columns * width, rows * height), FILTERS[config.resample])
        pictures = [
            image.crop((left, top, left + width, top + height))
            for top in range(0, image.height, height)
            for left in range(0, image.width, width)
        ]
    return torch.stack([preprocess(picture, config) for picture in (*pictures, image)])


def _longest(width: int, height: int, longest: int) -> tuple[int, int]:
    """The size at which the longer side is `longest` pixels, and the shorter one an even number of them: in floating
    point and in this order, since another could be 2 pixels off."""
    if width >= height:
        shorter = int(longest / (width / height))
        return longest, max(1, shorter + shorter % 2)
    shorter = int(longest * (width / height))
    return max(1, shorter + shorter % 2), longest


def preprocess(image: Image.Image, config: ImageConfig) -> torch.Tensor:
    """Resize, crop and normalise one RGB picture: float32 (3, height, width), (value / 255 − mean) / std."""
    resample = FILTERS[config.resample]
    if config.fit == "crop":
        width, height = (
            config.shortest_edge * side // min(image.size) for side in image.size
        )  # the resized picture
        left, top = (width - config.width) // 2, (height - config.height) // 2
        # Resize only what the crop keeps: the same pixels, but for a rounding here and there, for less work, and a 1 × 5000
        # picture needs no giant copy. ("nearest" can differ in a column or row exactly between two pixels.)
        columns = (
            left * image.width / width,
            0,
            (left + config.width) * image.width / width,
            image.height,
        )
        rows = (
            0,
            top * image.height / height,
            config.width,
            (top + config.height) * image.height / height,
        )
        # Columns first, as pillow does with a whole picture; of a part it may turn the two passes round.
        resized = image.resize((config.width, image.height), resample, columns)
        resized = resized.resize((config.width, config.height), resample, rows)
    else:
        resized = image.resize((config.width, config.height), resample)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)  # (3, height, width)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    return (
        pixels.to(torch.float32, memory_format=torch.contiguous_format)
        .div_(255)
        .sub_(mean)
        .div_(std)
    )
