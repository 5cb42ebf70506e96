"""Images inside tar files: `images.tar::a/b.jpg` is the member `a/b.jpg` of `images.tar`.

Nothing is unpacked. The headers of a tar file are read once into an index, name → place, which
worker processes forked later share.
"""

import os
import stat
import tarfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from nanovlm.errors import NanoVLMError

MARK = ".tar::"
DAMAGED = "is damaged, cut off or compressed; fetch it again, or pack it again as a plain tar file"

# Where a member's bytes start, and how many there are; None for a link, a folder or a device.
Place = tuple[int, int] | None


def is_member(path: str | Path) -> bool:
    """Whether `path` names a member of a tar file."""
    return MARK in str(path)


def check(path: str | Path) -> None:
    """Raise NanoVLMError, with the bare reason, unless `path` is a file, in a tar file or not."""
    if is_member(path):
        _find(path)
    elif not os.path.isfile(path):  # takes a path of any length, unlike pathlib's
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
    name = name.replace("\\", "/")  # as in paths of Windows
    archive += ".tar"
    try:
        status = os.stat(archive)
    except OSError as error:
        raise NanoVLMError(f"the archive cannot be read ({error.strerror})") from None
    index = (
        _index(archive, status.st_size, status.st_mtime_ns)
        if stat.S_ISREG(status.st_mode)
        else "is not a file"
    )
    if isinstance(index, str):
        raise NanoVLMError(f"the archive {index}")
    name = name.removeprefix("./")
    if name not in index:
        raise NanoVLMError("the archive has no such member")
    if (place := index[name]) is None:
        raise NanoVLMError("is a link, a folder or a device in the archive, not a file")
    return archive, place


@cache
def _index(archive: str, size: int, changed: int) -> dict[str, Place] | str:
    """Each member's place, or what is wrong with the archive.

    Both are kept, since a million records may name it.
    """
    try:
        return dict(_members(archive, size))
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except NanoVLMError as error:
        return str(error)
    except (tarfile.TarError, ValueError, OverflowError):
        return DAMAGED


def _members(archive: str, size: int) -> Iterator[tuple[str, Place]]:
    """Name and place of every member; later ones replace earlier ones of the same name."""
    with tarfile.open(archive, "r:") as tar:
        while (member := tar.next()) is not None:
            if member.sparse is not None:
                raise NanoVLMError(
                    "holds a sparse file, which has no one place; pack it again without --sparse"
                )
            if member.size < 0 or member.offset_data + member.size > size:
                raise NanoVLMError(DAMAGED)
            place = (member.offset_data, member.size) if member.isreg() else None
            yield member.name.removeprefix("./"), place
            # Otherwise tarfile keeps every header it has read.
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
        end = tar.offset
    with open(archive, "rb") as file:
        file.seek(end)  # tarfile takes anything that is not a header for the end: a block of zeros
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise NanoVLMError(DAMAGED)
