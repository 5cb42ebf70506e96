"""Images inside tar files: `images.tar::a/b.jpg` is the member `a/b.jpg` of `images.tar`, read where it lies.

Nothing is unpacked. A tar file's headers are read once into an index, name → place, which worker processes forked
later share. The layout is that of POSIX.1-2001 (ustar, and pax headers for what does not fit) and GNU tar's long names.
"""

import os
import stat
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from nanovlm.errors import NanoVLMError

MARK = ".tar::"
BLOCK = 512
MAX_NAME_BLOCK = 2**20  # bytes that may hold a long name; more is damage

Place = tuple[int, int] | None  # where a member's bytes start and how many; None: a link, a folder or a device


def is_member(path: str | Path) -> bool:
    """Whether `path` names a member of a tar file."""
    return MARK in str(path)


def check(path: str | Path) -> None:
    """Raise NanoVLMError, with the bare reason, unless `path` is a file or a plain file in a whole tar file."""
    if is_member(path):
        _find(path)
    elif not os.path.isfile(path):  # of any length, unlike pathlib's
        raise NanoVLMError("does not exist")


def read_member(path: str | Path) -> bytes:
    """The bytes of a tar file's member. Raises NanoVLMError with the bare reason."""
    archive, (start, size) = _find(path)
    try:
        with open(archive, "rb") as file:
            file.seek(start)
            data = file.read(size)
    except OSError as error:
        raise NanoVLMError(f"the archive cannot be read ({error.strerror})") from None
    if len(data) != size:
        raise NanoVLMError("the archive was cut off after its index was read")
    return data


def _find(path: str | Path) -> tuple[str, tuple[int, int]]:
    """The archive that `path` names, and the start and size of the member."""
    archive, _, name = str(path).partition(MARK)
    archive += ".tar"
    try:
        status = os.stat(archive)
    except OSError as error:
        raise NanoVLMError(f"the archive cannot be read ({error.strerror})") from None
    index = _index(archive, status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else "is not a file"
    if isinstance(index, str):
        raise NanoVLMError(f"the archive {index}")
    name = name.removeprefix("./")
    if name not in index:
        raise NanoVLMError("the archive has no such member")
    if index[name] is None:
        raise NanoVLMError("is a link, a folder or a device in the archive, not a file")
    return archive, index[name]


@lru_cache(maxsize=None)
def _index(archive: str, size: int, changed: int) -> dict[str, Place] | str:
    """Each member's place, or what is wrong with the archive: kept too, since a million records may name it."""
    try:
        with open(archive, "rb") as file:
            return dict(_members(file.fileno(), size))
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except NanoVLMError as error:
        return str(error)
    except ValueError:  # where a number should be
        return "is damaged, or compressed; fetch it again, or pack it again as a plain tar file"


def _members(file: int, size: int) -> Iterator[tuple[str, Place]]:
    """Name and place of every member, from headers alone; later ones replace earlier ones of the same name."""
    position, extended = 0, {}  # what a header says of the one after it
    while position + BLOCK <= size:
        header = os.pread(file, BLOCK, position)
        if header == bytes(BLOCK):
            return
        checksum = sum(header) - sum(header[148:156]) + 8 * ord(" ")
        if _number(header[148:156]) != checksum:
            raise ValueError
        start, length, kind = position + BLOCK, _number(header[124:136]), header[156:157]
        length = int(extended.get("size", length))
        if length < 0:
            raise ValueError
        position = start - -length // BLOCK * BLOCK  # members start at whole blocks
        if position > size:
            break
        if kind == b"S" or extended and any(key.startswith("GNU.sparse") for key in extended):
            raise NanoVLMError("holds a sparse file, which has no one place; pack it again without --sparse")
        if kind in b"LKxg":
            if length > MAX_NAME_BLOCK:
                raise ValueError
            data = os.pread(file, length, start)
            extended |= _pax(data) if kind == b"x" else {"path": _text(data)} if kind == b"L" else {}
            continue
        prefix = _text(header[345:500]) + "/" if header[257:263] == b"ustar\0" and header[345] else ""
        name = extended.get("path", prefix + _text(header[:100]))
        yield name.removeprefix("./"), (start, length) if kind in b"0\0007" and not name.endswith("/") else None
        extended = {}
    raise NanoVLMError("is cut off; fetch or pack it again")


def _pax(data: bytes) -> dict[str, str]:
    """A pax header's records, each `LENGTH KEY=VALUE` and a line break, all counted in LENGTH."""
    records = {}
    while data:
        length = int(data.partition(b" ")[0])
        if length <= 0:
            raise ValueError
        key, _, value = data[:length].partition(b" ")[2].partition(b"=")
        records[_text(key)] = _text(value.removesuffix(b"\n"))
        data = data[length:]
    return records


def _number(field: bytes) -> int:
    """A size: octal digits, or from 8 GiB on a binary number whose first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") - (1 << (8 * len(field) - 1))
    return int(field.strip(b" \0") or b"0", 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")
