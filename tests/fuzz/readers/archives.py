"""Tar files of images: headers of three dialects, with numbers and types that lie."""

import io
import tarfile
from functools import cache
from random import Random

from nanovlm.inputs.image import open_image
from tests.fuzz.commands.toy import SCENE
from tests.fuzz.damage import TEXTS, damaged_bytes, damaged_file
from tests.fuzz.inputs import Input, Kind

# Where the fields of a header are, and how long they are.
FIELDS = {
    "name": (0, 100),
    "size": (124, 12),
    "type": (156, 1),
    "magic": (257, 8),
    "prefix": (345, 155),
}
NUMBERS = (
    b"00000000000\0", b"77777777777\0", b"-0000000001\0", b"\x80" + b"\xff" * 11, b"\xff" * 12,
    (2**62 + (0x80 << 88)).to_bytes(12, "big"), b" " * 12, b"0x10\0" + bytes(7),
)  # fmt: skip


@cache
def _archive(format: int, long_name: bool) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name in ("a.png", "d/" * 60 + "b.png" if long_name else "b.png", "图.png"):
            header = tarfile.TarInfo(name)
            header.size = len(SCENE)
            tar.addfile(header, io.BytesIO(SCENE))
    return out.getvalue()


def make(rng: Random) -> Input:
    """An archive of three images with damaged headers, and the image to take from it."""
    format = rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    data = _archive(format, long_name=format != tarfile.USTAR_FORMAT and rng.random() < 0.5)
    member = rng.choice(("a.png", "b.png", "./a.png", "图.png", str(rng.choice(TEXTS))))
    content = damaged_file(rng, data, lambda: _damaged_headers(rng, data))
    return Input({"a.tar": content}, (f"a.tar::{member}",))


def _damaged_headers(rng: Random, data: bytes) -> bytes:
    blocks = [data[place : place + 512] for place in range(0, len(data), 512)]
    headers = [number for number, block in enumerate(blocks) if block[257:262] == b"ustar"]
    for _ in range(rng.choice((1, 1, 2))):
        number = rng.choice(headers)
        what = rng.randrange(6)
        if what == 0:
            blocks.insert(number, blocks[number])
        elif what == 1:
            kinds = (b"x", b"g", b"L", b"K", b"S", b"1", b"2", b"5", b"6", b"\0", b"Z")
            blocks[number] = _with_field(blocks[number], "type", rng.choice(kinds))
        elif what == 2:
            blocks[number] = _with_field(blocks[number], "size", rng.choice(NUMBERS))
        elif what == 3:
            field = rng.choice(list(FIELDS))
            blocks[number] = _with_field(blocks[number], field, rng.randbytes(FIELDS[field][1]))
        elif what == 4:  # a long name or extended header before every member, and many of them
            kind = rng.choice((b"L", b"x", b"g"))
            header = _with_field(
                _with_field(blocks[number], "type", kind), "size", b"00000000024\0"
            )
            record = b"20 path=" + rng.randbytes(11) + b"\n"
            blocks[number:number] = [header, record.ljust(512, b"\0")] * rng.choice((1, 3, 1500))
        else:
            after = min(number + 1, len(blocks) - 1)
            blocks[after] = damaged_bytes(rng, blocks[after])[:512].ljust(512, b"\0")
        headers = [number for number in headers if number < len(blocks)]
    data = b"".join(blocks)
    return data[: rng.randrange(len(data))] if rng.random() < 0.1 else data


def _with_field(block: bytes, field: str, value: bytes) -> bytes:
    """A header with another field and the right checksum."""
    start, length = FIELDS[field]
    block = block[:start] + value.ljust(length, b"\0")[:length] + block[start + length :]
    block = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def read(input: Input) -> None:
    """Open the image."""
    open_image(input.arguments[0])


KIND = Kind("archives", make, read, short=40, long=700)
