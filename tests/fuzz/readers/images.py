"""Image files of every format that is read, and of some that are not."""

import io
import struct
import zlib
from functools import cache
from random import Random

import numpy as np
from PIL import Image

from nanovlm.inputs.image import image_pixels, image_size, open_image
from nanovlm.inputs.image_config import ImageConfig
from tests.fuzz.damage import damaged_bytes, damaged_file
from tests.fuzz.inputs import FaultError, Input, Kind

CONFIGS = (
    ImageConfig(16, 16),
    ImageConfig(16, 16, fit="crop", shortest_edge=20),
    ImageConfig(16, 16, fit="tiles", max_tiles=4),
)
SIZES = (0, 1, 2, 3, 255, 8192, 2**16, 2**26, 2**31 - 1, 2**32 - 1)
# Format, mode and options of saving.
SAVED = (
    ("PNG", "RGB", {}), ("PNG", "RGBA", {}), ("PNG", "P", {}), ("PNG", "I;16", {}),
    ("PNG", "1", {}), ("JPEG", "RGB", {}), ("JPEG", "L", {}), ("JPEG", "CMYK", {}),
    ("JPEG", "RGB", {"progressive": True}), ("GIF", "P", {}), ("BMP", "RGB", {}),
    ("TIFF", "RGB", {}), ("TIFF", "F", {}),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}), ("PPM", "RGB", {}), ("PPM", "L", {}),
    ("WEBP", "RGB", {}), ("WEBP", "RGBA", {"lossless": True}),
)  # fmt: skip


@cache
def _saved(number: int, turned: int) -> bytes:
    format, mode, options = SAVED[number]
    values = np.random.default_rng(0).integers(0, 255, (13, 17, 3), dtype=np.uint8)
    image = Image.fromarray(values).convert("RGB")
    image = (
        Image.fromarray(np.array(image.convert("L"), np.uint16) * 200)
        if mode == "I;16"
        else image.convert(mode)
    )
    out = io.BytesIO()
    exif = Image.Exif()
    exif[274] = turned
    more = {"exif": exif} if turned and format in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    image.save(out, format, **options, **more)
    return out.getvalue()


def make(rng: Random) -> Input:
    """An image with damaged chunks, segments or bytes."""
    number = rng.randrange(len(SAVED))
    data = _saved(number, rng.choice((0, 0, 1, 3, 6, 8)))
    format = SAVED[number][0]

    def structured() -> bytes:
        if format == "PNG":
            return _damaged_png(rng, data)
        if format == "JPEG":
            return _damaged_jpeg(rng, data)
        cut = data[: rng.randrange(len(data))]
        # Headers are at the beginning, where most that matters is.
        early = damaged_bytes(rng, data[:64]) + data[64:]
        return rng.choice((cut, early, _other_number(rng, data), damaged_bytes(rng, data)))

    return Input({"a.img": damaged_file(rng, data, structured)})


def _other_number(rng: Random, data: bytes) -> bytes:
    """Another number of two or four bytes, or of digits, near the beginning or the end."""
    start = rng.choice((rng.randrange(64), rng.randrange(len(data) - 4)))
    size, order = rng.choice((2, 4)), rng.choice("<>")
    number = rng.choice(SIZES) & (2 ** (8 * size) - 1)
    written = struct.pack(f"{order}{'H' if size == 2 else 'I'}", number)
    if data.startswith(b"P"):  # PPM, whose header is text
        written = rng.choice((str(number).encode(), b"-1", b"#"))
        size = rng.choice((1, 2))
    return data[:start] + written + data[start + size :]


def _damaged_png(rng: Random, data: bytes) -> bytes:
    """A PNG with other chunks, whose checksums are mostly right."""
    chunks, place = [], 8
    while place < len(data):
        length, name = struct.unpack(">I4s", data[place : place + 8])
        chunks.append((name, data[place + 8 : place + 8 + length]))
        place += 12 + length
    for _ in range(rng.choice((1, 1, 2))):
        number = rng.randrange(len(chunks))
        name, content = chunks[number]
        what = rng.randrange(7)
        if what == 0:
            header = bytearray(chunks[0][1].ljust(13, b"\0"))
            struct.pack_into(">I", header, rng.choice((0, 4)), rng.choice(SIZES))
            chunks[0] = (b"IHDR", bytes(header))
        elif what == 1:
            text = zlib.compress(bytes(rng.choice((10, 2**20, 2**23))))
            kind = rng.choice((b"zTXt", b"iTXt", b"iCCP"))
            middle = b"\0\x01\0\0\0" if kind == b"iTXt" else b"\0\0"
            chunks.insert(rng.randrange(1, len(chunks) + 1), (kind, b"a" + middle + text))
        elif what == 2:
            kind = rng.choice(
                (b"tRNS", b"gAMA", b"eXIf", b"acTL", b"fcTL", b"PLTE", b"tEXt", b"pHYs")
            )
            chunks.insert(
                rng.randrange(1, len(chunks) + 1), (kind, rng.randbytes(rng.randrange(40)))
            )
        elif what == 3:
            del chunks[number]
        elif what == 4:
            chunks.insert(rng.randrange(len(chunks)), chunks[number])
        else:
            chunks[number] = (name, damaged_bytes(rng, content))
        if not chunks:
            break
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )
    return damaged_bytes(rng, data) if rng.random() < 0.1 else data


def _damaged_jpeg(rng: Random, data: bytes) -> bytes:
    """A JPEG with segments damaged, taken out or written often."""
    segments, place = [], 2
    while place < len(data) and data[place] == 0xFF and data[place + 1] not in (0xD9, 0xDA):
        end = place + 2 + struct.unpack(">H", data[place + 2 : place + 4])[0]
        segments.append(data[place:end])
        place = end
    scans = data[place:]
    number = rng.randrange(len(segments))
    what = rng.randrange(5)
    if what == 0:
        segments[number] = segments[number][:4] + damaged_bytes(rng, segments[number][4:])
    elif what == 1:
        del segments[number]
    elif what == 2:
        segments += [segments[number]] * rng.choice((1, 100))
    elif what == 3:  # the frame's size
        segments = [
            each[:5] + struct.pack(">HH", rng.choice((0, 1, 8192, 65535)), rng.choice((1, 8192)))
            + each[9:] if each[1] in (0xC0, 0xC2) else each for each in segments
        ]  # fmt: skip
    else:
        scans = rng.choice(
            (damaged_bytes(rng, scans), scans[:-2] * rng.choice((2, 300)), scans[: len(scans) // 2])
        )
    return data[:2] + b"".join(segments) + scans


def read(_: Input) -> None:
    """Decode the image and make pixels of it; its size is what its header says."""
    size, image = image_size("a.img"), open_image("a.img")
    if image.size != size:
        raise FaultError("the image has another size than its header says")
    for config in CONFIGS:
        pixels = image_pixels(image, config)
        if pixels.shape[1:] != (3, 16, 16) or not pixels.isfinite().all():
            raise FaultError(f"the pixels of fit = {config.fit} are not usable")


KIND = Kind("images", make, read, short=60, long=1200)
