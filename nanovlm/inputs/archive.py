"""Images inside tar files: `images.tar::a/b.jpg` is the member `a/b.jpg` of `images.tar`.

Nothing is unpacked. The headers of a tar file are read once into an index, name → place, which
worker processes forked later share. They are read here and not by tarfile, which trusts the sizes
that a damaged header claims.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

from nanovlm.errors import NanoVLMError
from nanovlm.utils.files import open_regular
from nanovlm.utils.sniff import what_is

MARK = ".tar::"
DAMAGED = "is damaged, cut off or compressed; fetch it again, or pack it again as a plain tar file"
BLOCK = 512  # bytes; headers and contents are filled up to whole blocks
MAX_HEADER = 2**20  # bytes of a long name, or of a member's attributes

NAME, PREFIX, MAGIC, POSIX = slice(100), slice(345, 500), slice(257, 263), b"ustar\0"
# Kinds of members.
REGULAR = (b"0", b"\0", b"7")
NO_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes
LONG_NAME, SPARSE = b"L", b"S"  # of GNU tar
ATTRIBUTES, SHARED_ATTRIBUTES = (b"x", b"X"), b"g"  # of POSIX: for the next member, or for all
HEADERS = (LONG_NAME, b"K", SHARED_ATTRIBUTES, *ATTRIBUTES)  # about a member; K: a link's target

# Where a member's bytes start, and how many there are; None for a link, a folder or a device.
Place = tuple[int, int] | None


def is_member(path: str | Path) -> bool:
    """Whether `path` names a member of a tar file."""
    return MARK in str(path)


def check(path: str | Path) -> None:
    """Raise NanoVLMError, with the bare reason, unless `path` is a file, in a tar file or not."""
    if is_member(path):
        with _opened(path):
            pass
    elif not os.path.isfile(path):  # takes a path of any length, unlike pathlib's
        kind = "is a folder, a pipe, a device or a link to nothing, not a file"
        raise NanoVLMError(kind if os.path.lexists(path) else "does not exist")


def read_member(path: str | Path) -> bytes:
    """The bytes of a tar file's member. Raises NanoVLMError with the bare reason."""
    with _opened(path) as (file, start, size):
        try:
            file.seek(start)
            data = file.read(size)
        except OSError as error:
            raise NanoVLMError(f"the archive cannot be read ({error.strerror})") from None
    if len(data) != size:
        raise NanoVLMError("the archive was cut off after its index was read")
    return data


def members(path: str | Path) -> list[str]:
    """The names of the files in a tar file, in their order. Raises NanoVLMError."""
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
    index = _index(str(path), status.st_size, status.st_mtime_ns)
    if isinstance(index, str):
        raise NanoVLMError(f"{path}: {index}")
    return [name for name, place in index.items() if place is not None]


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[BinaryIO, int, int]]:
    """The archive that `path` names, opened, and the start and size of the member."""
    archive, _, name = str(path).partition(MARK)
    archive += ".tar"
    try:
        file = open_regular(archive)
    except NanoVLMError as error:
        raise NanoVLMError(f"the archive {str(error).removeprefix(f'{archive}: ')}") from None
    with file:
        status = os.fstat(file.fileno())
        index = _index(archive, status.st_size, status.st_mtime_ns)
        if isinstance(index, str):
            raise NanoVLMError(f"the archive {index}")
        name = name.replace("\\", "/").removeprefix("./")  # backslashes as in paths of Windows
        if name not in index:
            raise NanoVLMError("the archive has no such member")
        if (place := index[name]) is None:
            raise NanoVLMError("is a link, a folder or a device in the archive, not a file")
        yield file, *place


@cache
def _index(archive: str, size: int, changed: int) -> dict[str, Place] | str:
    """Each member's place, or what is wrong with the archive.

    Both are kept, since a million records may name it.
    """
    try:
        with open(archive, "rb") as file:
            return dict(_members(file, size))
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except NanoVLMError as error:
        return str(error)


def _members(file: BinaryIO, size: int) -> Iterator[tuple[str, Place]]:
    """Name and place of every member; later ones replace earlier ones of the same name."""
    at, shared, attributes = 0, {}, {}
    while any(header := _read(file, at, BLOCK)):  # a block of zeros ends an archive
        if not _is_intact(header):
            what = what_is(header) if at == 0 else None
            raise NanoVLMError(DAMAGED if what in (None, "a tar archive") else f"is {what}")
        start, length, kind = at + BLOCK, _number(header[124:136]), header[156:157]
        if kind in HEADERS:
            data = _read(file, start, length)
            if kind == SHARED_ATTRIBUTES:
                shared |= _attributes(data)
            elif kind == LONG_NAME:
                attributes = {b"path": data.partition(b"\0")[0]} | attributes
            elif kind in ATTRIBUTES:
                attributes = _attributes(data) | attributes  # of two, the first counts
        else:
            attributes = shared | attributes
            if kind == SPARSE or any(key.startswith(b"GNU.sparse.") for key in attributes):
                raise NanoVLMError(
                    "holds a sparse file, which has no one place; pack it again without --sparse"
                )
            name = attributes.get(b"path") or _name(header)
            if kind in NO_CONTENT:
                length = 0
            elif text := attributes.get(b"size"):
                length = int(text) if re.fullmatch(rb"[0-9]{1,19}", text) else -1
            if not 0 <= length <= size - start:
                raise NanoVLMError(DAMAGED)
            is_file = kind in REGULAR and not name.endswith(b"/")
            key = name.decode(errors="surrogateescape").removeprefix("./").rstrip("/")
            yield key, (start, length) if is_file else None
            attributes = {}
        at = start + -(-length // BLOCK) * BLOCK


def _read(file: BinaryIO, at: int, size: int) -> bytes:
    """A header of `size` bytes."""
    file.seek(at)
    if not 0 <= size <= MAX_HEADER or len(data := file.read(size)) != size:
        raise NanoVLMError(DAMAGED)
    return data


def _is_intact(header: bytes) -> bool:
    """Whether the header has the sum that it states; some old programs added signed bytes."""
    stated, rest = _number(header[148:156]), header[:148] + b" " * 8 + header[156:]
    return stated == sum(rest) or stated == sum(rest) - 256 * sum(byte > 127 for byte in rest)


def _number(field: bytes) -> int:
    """The number in a header's field: octal digits or, after 0x80, plain bytes; -1 if neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:])
    octal = re.match(rb" *([0-7]*) *(\0|\Z)", field)
    return int(octal[1] or b"0", 8) if octal else -1


def _name(header: bytes) -> bytes:
    name, prefix = (header[field].partition(b"\0")[0] for field in (NAME, PREFIX))
    return prefix + b"/" + name if prefix and header[MAGIC] == POSIX else name


def _attributes(data: bytes) -> dict[bytes, bytes]:
    """Key → value of a header's records, each of which is "length key=value" and a line feed."""
    found, at = {}, 0
    while at < len(data):
        record = re.compile(rb"([0-9]{1,7}) ([^=]+)=").match(data, at)
        end = at + int(record[1]) if record else 0
        if not (record and record.end() < end <= len(data) and data[end - 1] == ord("\n")):
            raise NanoVLMError(DAMAGED)
        found[record[2]] = data[record.end() : end - 1]
        at = end
    return found
