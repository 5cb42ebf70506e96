"""Images inside tar files: `images.tar::a/b.jpg` is the member `a/b.jpg` of `images.tar`, read where it lies.

Nothing is unpacked. A tar file's headers are read once into an index, name → place, which worker processes forked
later share.
"""

import os
import stat
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from nanovlm.errors import NanoVLMError

MARK = ".tar::"
DAMAGED = "is damaged, cut off or compressed; fetch it again, or pack it again as a plain tar file"

Place = (
    tuple[int, int] | None
)  # where a member's bytes start and how many; None: a link, a folder or a device


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
    name = name.replace("\\", "/")  # Windows' paths come so
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
    if index[name] is None:
        raise NanoVLMError("is a link, a folder or a device in the archive, not a file")
    return archive, index[name]


@lru_cache(maxsize=None)
def _index(archive: str, size: int, changed: int) -> dict[str, Place] | str:
    """Each member's place, or what is wrong with the archive: kept too, since a million records may name it."""
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
            yield (
                member.name.removeprefix("./"),
                (member.offset_data, member.size) if member.isreg() else None,
            )
            tar.members.clear()  # where tarfile would keep everything it has read
        end = tar.offset
    with open(
        archive, "rb"
    ) as file:  # tarfile takes whatever is no header for the end, which is a block of zeros
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise NanoVLMError(DAMAGED)
