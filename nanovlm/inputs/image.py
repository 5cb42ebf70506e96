"""An image file → the pixels that the vision encoder takes.

Open safely, turn upright, resize, crop or cut into tiles, normalise.

Lesson: lessons/source/01_patches.py.
"""

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
from PIL import ExifTags, Image, TiffImagePlugin

from nanovlm.errors import NanoVLMError
from nanovlm.inputs import archive
from nanovlm.inputs.image_config import FILTERS, ImageConfig

T = TypeVar("T")

# 8192 × 8192: more than a 50-megapixel photo, and 256 MiB decoded (four bytes a pixel).
MAX_PIXELS = 2**26
# Formats that are decoded inside this process; EPS is not, because pillow starts ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# EXIF orientation → what turns the image upright; 1 is upright already.
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = [_TRANSPOSES[orientation] for orientation in (5, 6, 7, 8)]


def open_image(source: str | Path | bytes | BinaryIO) -> Image.Image:
    """Open an image as RGB, turned upright as its EXIF says.

    Transparency is put on white, of an animation the first frame is taken, and grey of 16 or 32
    bits is scaled to 8.

    `source` is a path, also one into a tar file (`images.tar::a.jpg`), a file's bytes, or a
    seekable binary stream, read from its start.

    Raises NanoVLMError, one line naming the source, for anything that is not a complete image in
    one of FORMATS with at most MAX_PIXELS. Nothing is decoded before the size is known.
    """
    return _read(source, _decode)


def image_size(source: str | Path | bytes | BinaryIO) -> tuple[int, int]:
    """(width, height) of what `open_image` gives, read from the file's header alone.

    The rest of the file may still be damaged.
    """
    return _read(source, _upright_size)


def _read(source: str | Path | bytes | BinaryIO, read: Callable[[BinaryIO], T]) -> T:
    """What `read` returns for an image file; any error becomes one line."""
    is_path = isinstance(source, (str, Path))
    name = source if is_path else getattr(source, "name", "image in memory")
    try:
        if isinstance(source, bytes):
            return read(io.BytesIO(source))
        if not isinstance(source, (str, Path)):
            return read(source)
        if archive.is_member(source):
            return read(io.BytesIO(archive.read_member(source)))
        if not Path(source).is_file():  # reading a device or a pipe could never end
            raise NanoVLMError("not a file" if Path(source).exists() else "no such file")
        with Path(source).open("rb") as file:
            return read(file)
    except NanoVLMError as error:
        reason = str(error)
    except Image.UnidentifiedImageError:
        reason = f"not an image, or cut off in its header; can read {', '.join(FORMATS)}"
    except Image.DecompressionBombError:
        reason = f"more pixels than the limit of {MAX_PIXELS:,}; make the image smaller first"
    except Exception as error:  # pillow raises nearly every built-in exception on broken files
        reason = f"cannot read the image: {' '.join(str(error).split()) or type(error).__name__}"
    raise NanoVLMError(f"{name}: {reason}")


def _open(file: BinaryIO) -> Image.Image:
    """The image with nothing decoded yet."""
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
        # Pillow warns about unusual metadata, and about sizes, which are checked here.
        warnings.simplefilter("ignore")
        image = _open(file)
        image.load()
        transpose = _transpose(image.getexif)
        image = _to_rgb(image)
        return image if transpose is None else image.transpose(transpose)


def _upright_size(file: BinaryIO) -> tuple[int, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _open(file)
        width, height, getexif = *image.size, image.getexif
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            # Pillow turns it by itself, and some versions its `size` already; this is the file's.
            tags = image.tag_v2
            width, height = tags[ExifTags.Base.ImageWidth], tags[ExifTags.Base.ImageLength]
        elif image.format == "PNG" and not _has_metadata_after_pixels(file):
            # A PNG's own method decodes the image, to look for metadata after it.
            getexif = partial(Image.Image.getexif, image)
        return (height, width) if _transpose(getexif) in _SIDEWAYS else (width, height)


def _has_metadata_after_pixels(file: BinaryIO) -> bool:
    """Whether a PNG has text or EXIF after its pixels, which may hold its orientation."""
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
    """What turns an image upright; None if it is, or if its EXIF is damaged (as viewers do)."""
    try:
        return _TRANSPOSES.get(getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
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

    White is 65535 in 16-bit files. 32-bit files do not say what white is: it is taken to be the
    first of 1, 255, 65535 and the largest value that no value exceeds. Black is 0, or the smallest
    value if that is negative.
    """
    values = np.array(image, dtype=np.float32)
    low, high = min(0.0, float(values.min())), float(values.max())
    if not math.isfinite(high - low):
        raise NanoVLMError("the image holds NaN or infinite values")
    is_16_bit_ppm = image.mode == "I" and image.format == "PPM"
    if image.mode in ("I", "F") and not is_16_bit_ppm:
        white = next(level for level in (1.0, 255.0, 65535.0, high) if high <= level)
    else:
        white = 65535.0
    grey = ((values - low) * (255 / (white - low)) + 0.5).astype(np.uint8)
    if isinstance(image.info.get("transparency"), int):  # the one grey of a PNG that is transparent
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def tile_grid(width: int, height: int, config: ImageConfig) -> tuple[int, int]:
    """(rows, columns) of the tiles of an image of this size; (0, 0) where it is not cut."""
    if config.max_tiles is None:
        return 0, 0
    width, height = _longest(width, height, config.max_tiles * config.width)
    return math.ceil(height / config.height), math.ceil(width / config.width)


def image_pixels(image: Image.Image, config: ImageConfig) -> torch.Tensor:
    """The tiles of an RGB image: float32 (n, 3, height, width); n is 1 where it is not cut.

    They come row by row, and the whole image after them. It is resized in the steps of the
    reference (Idefics3), each rounded to whole values, so that the pixels are the same.
    """
    tiles = []
    if config.max_tiles is not None:
        width, height, resample = config.width, config.height, FILTERS[config.resample]
        rows, columns = tile_grid(*image.size, config)
        image = image.resize(_longest(*image.size, config.max_tiles * width), resample)
        image = image.resize((columns * width, rows * height), resample)
        tiles = [
            image.crop((left, top, left + width, top + height))
            for top in range(0, image.height, height)
            for left in range(0, image.width, width)
        ]
    return torch.stack([preprocess(tile, config) for tile in (*tiles, image)])


def _longest(width: int, height: int, longest: int) -> tuple[int, int]:
    """The size at which the longer side is `longest` pixels and the shorter one an even number.

    In floating point and in this order, as in the reference: another could be 2 pixels off.
    """
    if width >= height:
        shorter = int(longest / (width / height))
        return longest, max(1, shorter + shorter % 2)
    shorter = int(longest * (width / height))
    return max(1, shorter + shorter % 2), longest


def preprocess(image: Image.Image, config: ImageConfig) -> torch.Tensor:
    """Resize, crop and normalise one RGB image or tile: float32 (3, height, width).

    A value from 0 to 255 becomes (value / 255 − mean) / std.
    """
    if config.shortest_edge is not None:
        resized = _resize_and_crop(image, config, config.shortest_edge)
    else:
        resized = image.resize((config.width, config.height), FILTERS[config.resample])
    values = torch.from_numpy(np.array(resized)).permute(2, 0, 1)  # (3, height, width)
    pixels = values.to(torch.float32, memory_format=torch.contiguous_format)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (config.mean, config.std))
    return pixels.div_(255).sub_(mean).div_(std)


def _resize_and_crop(image: Image.Image, config: ImageConfig, shortest_edge: int) -> Image.Image:
    """Resize `image` until its shorter side is `shortest_edge`, and cut out the middle.

    Only what the crop keeps is resized. That gives the same pixels but for some rounding, for less
    work, and an image of 1 × 5000 needs no giant copy. (With "nearest", a column or row that lies
    exactly between two pixels can differ.)
    """
    width, height = (shortest_edge * side // min(image.size) for side in image.size)
    left, top = (width - config.width) // 2, (height - config.height) // 2
    right, bottom = left + config.width, top + config.height
    columns = (left * image.width / width, 0, right * image.width / width, image.height)
    rows = (0, top * image.height / height, config.width, bottom * image.height / height)
    # Columns first, as pillow does with a whole image; for a part it may swap the two passes.
    resample = FILTERS[config.resample]
    resized = image.resize((config.width, image.height), resample, columns)
    return resized.resize((config.width, config.height), resample, rows)
