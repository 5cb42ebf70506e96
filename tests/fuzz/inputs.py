"""What a fuzzer makes: files in an otherwise empty folder, and arguments of a command."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from random import Random


class Special(Enum):
    """What can stand where a file is expected."""

    PIPE = "a pipe that nobody writes to"
    ENDLESS = "a link to /dev/zero"
    FOLDER = "a folder"
    LOOP = "a link to itself"


Content = bytes | Special
STDIN = ".stdin"  # the name of the file whose bytes a command gets as its stdin


@dataclass(frozen=True)
class Input:
    """Files by their paths in the input's folder, and arguments."""

    files: dict[str, Content]
    arguments: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Make the folder."""
        folder.mkdir()
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif content is Special.PIPE:
                os.mkfifo(path)
            elif content is Special.FOLDER:
                path.mkdir()
            else:
                path.symlink_to("/dev/zero" if content is Special.ENDLESS else path.name)

    def changed(self, folder: Path) -> list[str]:
        """The files of the input that are not in `folder` any more as they were written."""
        return [
            name
            for name, content in self.files.items()
            if not os.path.lexists(path := folder / name)
            or (
                isinstance(content, bytes) and not (path.is_file() and path.read_bytes() == content)
            )
        ]

    def added(self, folder: Path) -> list[str]:
        """Files in `folder`, but for hidden ones, that the input did not bring."""
        files = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
        names = (path.as_posix() for path in sorted(files) if not is_hidden(path))
        return [name for name in names if name not in self.files]

    def with_file(self, name: str, content: Content) -> "Input":
        """The input with another content of one file."""
        return replace(self, files={**self.files, name: content})


def is_hidden(path: Path) -> bool:
    """Whether a name of the path begins with a dot: it is taken for no finished work."""
    return any(part.startswith(".") for part in path.parts)


class FaultError(Exception):
    """Something is wrong although nothing was raised: an input is changed, a number unusable."""


def nothing_lost(input: Input, folder: Path, was_read: bool) -> None:
    """Check that all files are as they were, and that nothing new is there after a refusal."""
    if changed := input.changed(folder):
        raise FaultError(f"changed {', '.join(changed)}")
    if not was_read and (added := input.added(folder)):
        raise FaultError(f"refused, and left {', '.join(added)}")


@dataclass(frozen=True)
class Kind:
    """A kind of input: how to make one, and what reads it.

    `read` is called in the input's folder, and ends as the `main` of a command does. `check` looks
    at the folder afterwards. Both raise FaultError for what is wrong though nothing was raised.
    """

    name: str
    make: Callable[[Random], Input]
    read: Callable[[Input], None]
    short: int  # inputs of the default run of the tests
    long: int  # of 10,000
    check: Callable[[Input, Path, bool], None] = nothing_lost
