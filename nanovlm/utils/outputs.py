"""What commands and tools write: never over an input or anything else that is there, and whole.

A command checks the output that a flag names before its work begins (`check_new_file`), and writes
it at the end (`new_file`, `write_new`); a folder is filled under a hidden name beside it and then
renamed (`new_folder`). So a tool that fails or is killed leaves nothing that looks whole. A run
folder, which grows while it is there, has one writer at a time (`only_writer`).
"""

import argparse
import errno
import os
import re
import shutil
import socket
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import IO

from nanovlm.errors import NanoVLMError
from nanovlm.utils.console import say
from nanovlm.utils.files import atomic_path, flush_folder, temporary_beside
from nanovlm.utils.processes import is_main

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK = ".lock"
LOCKED_BYTE = 2**30  # beyond the text of the file: on Windows nobody else could read a locked part
IS_LOCKED = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


def add_replace_flag(parser: argparse.ArgumentParser) -> None:
    """Give the parser of a tool whose products ship the flag `--replace`."""
    parser.add_argument("--replace", action="store_true", help="replace what is there")


def check_new_file(
    path: Path, flag: str, inputs: Iterable[str | Path] = (), *, replace: bool | None = None
) -> None:
    """Refuse a file to write that is an input, is there already, or could not be written.

    flag: the one that names it. inputs: the files and folders that the command reads.
    replace: whether a file that is there, and no input, may be replaced; None if no flag says so.
    """
    check_no_input(path, flag, inputs)
    if os.path.isdir(path):
        raise NanoVLMError(f"{path}: is a folder; name a file with {flag}")
    if not os.path.isdir(path.parent):
        raise NanoVLMError(
            f"{path.parent}: is not a folder; make it, so that {flag} can be written"
        )
    if os.path.lexists(path):
        if replace and os.path.isfile(path):
            return
        raise NanoVLMError(
            f"{path}: is there already and stays as it is; name another file with {flag}, "
            + ("or delete this one" if replace is None else "or give --replace")
        )
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))  # only a try tells for sure
        path.unlink()
    except OSError as error:
        raise NanoVLMError(
            f"{path}: cannot be written ({error.strerror}); name another file with {flag}"
        ) from None


def check_no_input(path: Path, flag: str, inputs: Iterable[str | Path]) -> None:
    """Refuse an output that is one of the inputs, by whatever name, or lies inside of one."""
    real = Path(os.path.realpath(path))
    for given in inputs:
        if _is_same(real, given):
            raise NanoVLMError(
                f"{path}: is read by this command ({given}) and stays as it is; "
                f"name something else with {flag}"
            )
        if any(_is_same(folder, given) for folder in real.parents):
            raise NanoVLMError(
                f"{path}: lies in a folder that this command reads ({given}); "
                f"name a place outside of it with {flag}"
            )


def _is_same(path: Path, other: str | Path) -> bool:
    """Whether both are there and are one file or folder, also through links."""
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False


def new_file(path: Path, *, replace: bool = False) -> AbstractContextManager[Path]:
    """A temporary path that becomes `path` on success and is deleted on failure.

    A file that another process has made at `path` meanwhile stays, unless it is to be replaced: the
    error says where the new one is then.
    """
    return atomic_path(path, None if replace else _move_without_replacing)


def write_new(path: Path, data: bytes | str, *, replace: bool = False) -> None:
    """Write `data` (text as UTF-8) to `path` as `new_file` does."""
    with new_file(path, replace=replace) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def _move_without_replacing(source: Path, target: Path) -> None:
    try:
        os.link(source, target)  # which fails if there is a file, unlike a rename
        return
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links, or Windows without the right to make them
        if not os.path.lexists(target):
            os.rename(source, target)
            return
    kept = target.with_name(f"{target.stem[:40]}.{token_hex(4)}{target.suffix}")
    os.replace(source, kept)
    raise NanoVLMError(
        f"{target}: was made by another process meanwhile and stays as it is; "
        f"what was to be written there is in {kept}"
    )


class TakenError(NanoVLMError):
    """Another process has made a folder meanwhile; what was to become it is in `kept`."""

    def __init__(self, message: str, kept: Path) -> None:
        super().__init__(message)
        self.kept = kept


@contextmanager
def new_folder(path: Path, flag: str, *, replace: bool | None = None) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `path` on success and is deleted on failure.

    flag, replace: as in `check_new_file`.
    Raises NanoVLMError at once for one that holds anything, so for any input, and for one that
    could not be made; TakenError at the end if another process has made it meanwhile.
    """
    target = Path(os.path.realpath(path))  # "." has a name of its own then
    _check_new_folder(path, flag, replace=replace)
    temporary = temporary_beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise NanoVLMError(
            f"{path}: cannot be written ({error.strerror}); name another folder with {flag}"
        ) from None
    try:
        yield temporary
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):  # a full disk does not name the file
            error.filename = error.filename or str(path)
        raise
    old = target.with_name(f"{temporary.name}.old")
    try:
        if target.is_dir() and replace:
            os.rename(target, old)
        elif target.is_dir():
            target.rmdir()  # it was empty; not every system renames onto an empty folder
        os.rename(temporary, target)
    except OSError as error:
        raise TakenError(
            f"{path}: cannot be made any more ({error.strerror}); was it made by another process? "
            f"What was to be there is in {temporary}",
            temporary,
        ) from None
    shutil.rmtree(old, ignore_errors=True)
    flush_folder(target.parent)


def _check_new_folder(path: Path, flag: str, *, replace: bool | None) -> None:
    if os.path.isdir(path):
        if not replace and (names := sorted(os.listdir(path))):
            raise NanoVLMError(
                f"{path}: holds {names[0]} already; name a new or an empty folder with {flag}"
                + ("" if replace is None else ", or give --replace")
            )
        if os.path.ismount(path):
            raise NanoVLMError(
                f"{path}: is where a disk is mounted; name a folder inside of it with {flag}"
            )
    elif os.path.lexists(path):
        raise NanoVLMError(f"{path}: is not a folder; name a new one with {flag}")


@contextmanager
def only_writer(folder: Path, flag: str) -> Iterator[None]:
    """Hold the lock of a folder, which is made if need be; refused while another process holds it.

    It is a lock of the operating system on a hidden file, so it ends with the process, however that
    ends. Of the processes of one run rank 0 holds it. A folder made here that is empty afterwards
    is deleted again.
    """
    if not is_main():
        yield
        return
    is_new = not os.path.lexists(folder)
    if _is_no_folder(folder):
        raise NanoVLMError(f"{folder}: is not a folder; name another one with {flag}")
    file = _take_lock(folder, flag)
    try:
        yield
    finally:
        if sys.platform == "win32":
            file.close()  # an open file cannot be deleted there
        with suppress(OSError):
            (folder / LOCK).unlink()  # while it is locked, so that nobody locks what is deleted
        file.close()
        if is_new:
            with suppress(OSError):
                folder.rmdir()


def _is_no_folder(path: Path) -> bool:
    """Whether something is there that is neither a folder nor a link to one.

    It looks once: another process may make and delete the folder meanwhile.
    """
    try:
        return not stat.S_ISDIR(os.stat(path).st_mode)
    except OSError:
        return os.path.islink(path)


def _take_lock(folder: Path, flag: str) -> IO[bytes]:
    """The open file whose lock this process holds from now on."""
    path = folder / LOCK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+b")  # noqa: SIM115 (it stays open as long as it is locked)
        except FileNotFoundError:  # whoever made the folder has deleted it just now
            continue
        except FileExistsError as error:  # the same, while `mkdir` looked
            if _is_no_folder(error.filename):
                raise
            continue
        try:
            _lock(file)
        except OSError as error:
            file.seek(0)
            writer = file.read(200).decode(errors="replace").strip()
            if error.errno in IS_LOCKED or not _is_dead(writer):
                file.close()
                raise NanoVLMError(
                    f"{folder}: is being written by another process"
                    + (f" ({writer})" if writer else "")
                    + f"; wait until it ends, or name another folder with {flag}"
                    + ("" if error.errno in IS_LOCKED else f"; if it has ended, delete {path}")
                ) from None
            say(
                f"{folder}: this file system has no locks ({error.strerror}); "
                "take care that no other run writes there"
            )
        try:
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        except FileNotFoundError:
            pass
        file.close()  # whoever had the lock has deleted the file just now
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    file.flush()
    return file


def _is_dead(writer: str) -> bool:
    """Whether the process that a lock file names has ended for sure; true if it names none."""
    named = re.fullmatch("process ([0-9]{1,9}) on (.*)", writer)
    if named is None or sys.platform == "win32":
        return not writer
    try:
        os.kill(int(named[1]), 0)  # sends nothing
    except ProcessLookupError:
        return named[2] == socket.gethostname()
    except OSError:  # another user's
        pass
    return False


def _lock(file: IO[bytes]) -> None:
    """Lock an open file without waiting; OSError if another process has locked it.

    POSIX locks belong to the process: workers that it forks do not keep them alive.
    """
    if sys.platform == "win32":
        file.seek(LOCKED_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
