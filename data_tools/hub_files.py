"""Files of a hub and files on the disk: their paths, sizes and digests."""

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from nanovlm.errors import NanoVLMError, quoted
from nanovlm.utils.files import open_regular, read_json

RECORD = ".download"  # begins the name of what says which files were fetched into a folder
PARTIAL = ".incomplete"  # what has arrived in part
BLOCK = 2**20


@dataclass(frozen=True)
class HubFile:
    """A file as the hub lists it."""

    path: str  # within the repository, with /
    size: int  # bytes
    digest: str  # "sha256:…", or "git:…", the id that git gives a small file


def read_record(path: Path) -> dict[str, Any]:
    """What says which files were fetched, with their sizes and digests; {} if it is not there."""
    if not path.exists():
        return {}
    record = read_json(path)
    files = record.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(line, list) and [*map(type, line)] == [int, str] for line in files.values()
    ):
        raise NanoVLMError(f"{path}: is damaged; delete it, and what is there is checked again")
    return record


def size_of(folder: Path) -> int:
    """The bytes of all files of a folder, which may be moved away meanwhile."""
    size = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            size += path.lstat().st_size if path.is_file() else 0
    return size


def has_size(path: Path, size: int) -> bool:
    """Whether this is a file of so many bytes."""
    return path.is_file() and path.stat().st_size == size


def check_path(path: str, repository: str) -> None:
    """Refuse a name that would lie outside of the folder, or hide among our own files."""
    parts = PurePosixPath(path).parts
    if (
        not parts
        or path.startswith("/")
        or "/".join(parts) != path
        or any(part in (".", "..", PARTIAL) or part.startswith(RECORD) for part in parts)
        or any(character in path or not path.isprintable() for character in '\\:*?"<>|')
    ):
        raise NanoVLMError(f"{repository}: lists a file named {quoted(path)}, which is not fetched")


def find_lacking(
    folder: Path, files: list[HubFile], recorded: dict[str, tuple[int, str]]
) -> list[HubFile]:
    """The files that are not there. One of another content is refused, unless it came from here."""
    lacking = []
    for file in files:
        path = folder / file.path
        size, digest = recorded.get(file.path, (-1, ""))
        if not os.path.lexists(path):
            lacking.append(file)
        elif has_size(path, file.size) and (digest == file.digest or has_digest(path, file.digest)):
            continue
        elif has_size(path, size) and has_digest(path, digest):
            lacking.append(file)  # of an earlier revision
        else:
            raise NanoVLMError(
                f"{path}: is there already with another content than the hub's and stays as it is; "
                "move it away, or name another folder with --to"
            )
    return lacking


def has_digest(path: Path, digest: str) -> bool:
    """Whether a file has a digest of `HubFile`; also where the hub gives none."""
    kind, _, expected = digest.partition(":")
    if not expected:
        return True
    hasher = hashlib.sha256() if kind == "sha256" else hashlib.sha1(usedforsecurity=False)
    if kind == "git":
        hasher.update(f"blob {path.stat().st_size}\0".encode())
    with open_regular(path) as file:
        while block := file.read(BLOCK):
            hasher.update(block)
    return hasher.hexdigest() == expected
