"""An image file → the pixels that the vision encoder takes.

Open safely, turn upright, resize, crop or cut into tiles, normalise.

Lesson: lessons/source/01_patches.py.
"""

import io
import math
import re
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin

from nanovlm.errors import NanoVLMError
from nanovlm.inputs import archive, data_uri
from nanovlm.inputs.image_config import FILTERS, ImageConfig
from nanovlm.utils.files import open_regular
from nanovlm.utils.sniff import FIRST_BYTES, what_is

T = TypeVar("T")

# 8192 × 8192: more than a 50-megapixel photo, and 256 MiB decoded (four bytes a pixel).
MAX_PIXELS = 2**26
LONG_SIDE = 32  # times the shorter one: a longer image is not resized whole to be cropped
MAX_SIDE = 2**16  # pixels; pillow's resizing takes memory by the side
MAX_BYTES = 2**29  # of a file: the pixels of the largest image, 8 bytes each
MAX_SCANNED = 2**30  # pixels of all scans of a JPEG; a progressive one has about 10 scans
MAX_SLOW = 2**21  # bytes of a PPM in text, or of unusual depth, which pillow decodes in Python
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
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(="|>)([0-9])')
LONG = 4  # EXIF's number of the type of 32 bits; an orientation usually has 16
TEXT_CHUNKS = (b"iTXt", b"tEXt", b"zTXt")  # of a PNG
# The byte after 0xff is 0, or counts to 7, within a scan; it is 0xff where a marker is filled up.
_JPEG_MARKER = re.compile(rb"\xff([^\0\xd0-\xd7\xff])", re.DOTALL)


def open_image(source: str | Path | bytes | BinaryIO) -> Image.Image:
    """Open an image as RGB, turned upright as its EXIF says.

    Transparency is put on white, of an animation the first frame is taken, and grey of 16 or 32
    bits is scaled to 8.

    `source` is a path, also one into a tar file (`images.tar::a.jpg`), a file's bytes, or a
    seekable binary stream, read from its start.

    Raises NanoVLMError, one line naming the source, for anything that is not a complete image in
    one of FORMATS within the limits above. Nothing is decoded before the size is known. Long text
    in a PNG is passed over.
    """
    return _read(source, _decode)


def image_size(source: str | Path | bytes | BinaryIO) -> tuple[int, int]:
    """(width, height) of what `open_image` gives, read from the file's header alone.

    The rest of the file may still be damaged.
    """
    return _read(source, _upright_size)


def _read(source: str | Path | bytes | BinaryIO, read: Callable[[BinaryIO], T]) -> T:
    """What `read` returns for an image file; any error becomes one line."""
    if isinstance(source, Path) and data_uri.is_data_uri(source):
        return _read(data_uri.read(source), read)
    is_path = isinstance(source, (str, Path))
    name = source if is_path else getattr(source, "name", "image in memory")
    try:
        if isinstance(source, bytes):
            return _read_file(io.BytesIO(source), read)
        if not isinstance(source, (str, Path)):
            return _read_file(source, read)
        if archive.is_member(source):
            return _read_file(io.BytesIO(archive.read_member(source)), read)
        with open_regular(source) as file:
            return _read_file(file, read)
    except NanoVLMError as error:
        reason = str(error).removeprefix(f"{name}: ")
    except Image.DecompressionBombError:
        reason = f"more pixels than the limit of {MAX_PIXELS:,}; make the image smaller first"
    except Exception as error:  # pillow raises nearly every built-in exception on broken files
        reason = f"cannot read the image: {' '.join(str(error).split()) or type(error).__name__}"
    raise NanoVLMError(f"{name}: {reason}")


def _read_file(file: BinaryIO, read: Callable[[BinaryIO], T]) -> T:
    size = file.seek(0, io.SEEK_END)
    if size > MAX_BYTES:
        raise NanoVLMError(f"has {size:,} bytes, more than the limit of {MAX_BYTES:,}")
    with warnings.catch_warnings():
        # Pillow warns about unusual metadata, and about sizes, which are checked here.
        warnings.simplefilter("ignore")
        try:
            metered = _Metered(file, 4 * size + 2**28)
            return read(metered)  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            if "MAX_TEXT" not in str(error):  # the names of pillow's limits
                raise
            return read(io.BytesIO(_without_text(file)))


class _Metered:
    """A file of which about `limit` bytes are read, and no more.

    Thousands of tags may name the same bytes, and a header may be all padding, which pillow reads
    byte by byte.
    """

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file, self._left = file, limit

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._left -= len(data) + 64  # what a call costs
        if self._left < 0:
            raise NanoVLMError("is all header, or its parts lie over each other; save it again")
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _without_text(file: BinaryIO) -> bytes:
    """A PNG without its text and colour profile, of which pillow reads only so much."""
    file.seek(0)
    data = file.read()
    kept, at = [data[:8]], 8  # the signature; then each chunk's length, name, data and checksum
    while len(data) - at >= 8:
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + length + 12
        kept += [] if name in (*TEXT_CHUNKS, b"iCCP") else [data[at:end]]
        at = end
    return b"".join(kept)


def _open(file: BinaryIO) -> ImageFile.ImageFile:
    """The image with nothing decoded yet."""
    file.seek(0)
    start = file.read(FIRST_BYTES)
    if not start:
        raise NanoVLMError("the file is empty")
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.UnidentifiedImageError:
        what = what_is(start)
        if what and not re.match("an? (JPEG|PNG|WebP|GIF|BMP|TIFF) image", what):
            raise NanoVLMError(f"is {what}") from None
        raise NanoVLMError(
            f"not an image, or cut off in its header; can read {', '.join(FORMATS)}"
        ) from None
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise NanoVLMError(
            f"{width} x {height} is beyond the limits of {MAX_PIXELS:,} pixels in all and "
            f"{MAX_SIDE:,} a side; make the image smaller first"
        )
    return image


def _decode(file: BinaryIO) -> Image.Image:
    image = _open(file)
    if image.format in ("JPEG", "MPO"):
        _check_scans(file, MAX_SCANNED // (image.width * image.height))
    is_slow = image.format == "PPM" and image.tile[0][0] != "raw"
    if is_slow and file.seek(0, io.SEEK_END) > MAX_SLOW:
        raise NanoVLMError(
            f"a PPM in text, or of unusual depth, of more than {MAX_SLOW:,} bytes; save it as PNG"
        )
    image.load()
    transpose = _transpose(image)
    image = _to_rgb(image)
    return image if transpose is None else image.transpose(transpose)


def _check_scans(file: BinaryIO, most: int) -> None:
    """Refuse a JPEG of more than `most` scans, each of which takes as long as a whole image."""
    file.seek(0)
    data = file.read()
    if data.count(b"\xff\xda") <= most:  # also within thumbnails and other data
        return
    at = scans = 0
    while (marker := _JPEG_MARKER.search(data, at)) and marker[1] != b"\xd9":  # the image's end
        at = marker.end()
        if marker[1] != b"\xd8":  # its start; all others have a length
            at += int.from_bytes(data[at : at + 2])
        scans += marker[1] == b"\xda"
        if scans > most:
            raise NanoVLMError(
                f"a JPEG of more than {most} scans, too many for its size; save it again"
            )


def _upright_size(file: BinaryIO) -> tuple[int, int]:
    image = _open(file)
    width, height = image.size
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # Pillow turns it by itself, and some versions its `size` already; this is the file's.
        tags = image.tag_v2
        width, height = tags[ExifTags.Base.ImageWidth], tags[ExifTags.Base.ImageLength]
    elif image.format == "PNG" and _has_metadata_after_pixels(file):
        image.load()
    return (height, width) if _transpose(image) in _SIDEWAYS else (width, height)


def _has_metadata_after_pixels(file: BinaryIO) -> bool:
    """Whether a PNG has text or EXIF after its pixels, which may hold its orientation."""
    position, pixels_seen, found = file.tell(), False, False
    file.seek(8)  # the signature; then each chunk's length, name, data and checksum
    while not found and len(start := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", start)
        pixels_seen |= name == b"IDAT"
        found = pixels_seen and name in (b"eXIf", *TEXT_CHUNKS)
        file.seek(length + 4, io.SEEK_CUR)
    file.seek(position)
    return found


def _transpose(image: Image.Image) -> Image.Transpose | None:
    """What turns an image upright; None if it is, or if its EXIF is damaged (as viewers do)."""
    try:
        return _TRANSPOSES.get(_orientation(image))
    except Exception:
        return None


def _orientation(image: Image.Image) -> int:
    """As EXIF or, failing that, XMP has it; 1 is upright."""
    info, orientation = image.info, None
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    if exif := info.get("exif"):
        orientation = _exif_orientation(exif)
    elif hexadecimal := info.get("Raw profile type exif"):  # as ImageMagick wrote it into PNGs
        orientation = _exif_orientation(bytes.fromhex("".join(hexadecimal.split("\n")[3:])))
    if orientation is None:
        xmp = info.get("XML:com.adobe.xmp") or info.get("xmp") or b""
        xmp = xmp.encode() if isinstance(xmp, str) else xmp
        orientation = int(found[2]) if (found := _XMP_ORIENTATION.search(xmp)) else 1
    return orientation


def _exif_orientation(exif: bytes) -> int | None:
    """The orientation tag alone: pillow reads all tags, and each may claim the whole file."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}[exif[:2]]
    (start,) = struct.unpack_from(f"{order}I", exif, 4)
    (count,) = struct.unpack_from(f"{order}H", exif, start)
    for at in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind = struct.unpack_from(f"{order}HH", exif, at)
        if tag == ExifTags.Base.Orientation:
            return struct.unpack_from(order + ("I" if kind == LONG else "H"), exif, at + 8)[0]
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


def resized_within(
    image: Image.Image, side: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """The image with its longer side at `side` pixels, for people to look at.

    The shorter one keeps a pixel at least: 4000 × 3 pixels would leave none at 320.
    """
    scale = side / max(image.size)
    width, height = (max(1, round(scale * each)) for each in image.size)
    return image.resize((width, height), resample)


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

    Of a very long image only what the crop keeps is resized, so that 1 × 5000 pixels need no giant
    copy. That gives the same pixels but for some rounding. (With "nearest", a column or row that
    lies exactly between two pixels can differ, and pillow 13 resizes the rows of a tall image
    first.)
    """
    width, height = (shortest_edge * side // min(image.size) for side in image.size)
    left, top = (width - config.width) // 2, (height - config.height) // 2
    right, bottom = left + config.width, top + config.height
    resample = FILTERS[config.resample]
    if max(image.size) <= LONG_SIDE * min(image.size):
        return image.resize((width, height), resample).crop((left, top, right, bottom))
    columns = (left * image.width / width, 0, right * image.width / width, image.height)
    rows = (0, top * image.height / height, config.width, bottom * image.height / height)
    # Columns first, as pillow does with a wide image; for a part it may swap the two passes.
    resized = image.resize((config.width, image.height), resample, columns)
    return resized.resize((config.width, config.height), resample, rows)
