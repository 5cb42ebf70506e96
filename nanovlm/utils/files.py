"""Reading and writing files; a crash at any moment leaves the old file or the new one, whole."""

import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any, BinaryIO

from nanovlm.errors import NanoVLMError
from nanovlm.utils.sniff import FIRST_BYTES, what_is

MAX_TEXT = 2**27  # bytes: four times the largest published tokenizer.json
MAX_NESTING = 64  # lists and objects within each other; a tokenizer.json has 8
_NOT_FILES = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode), "a device"),
)


def temporary_beside(path: Path) -> Path:
    """A hidden name under which to write what becomes `path` once it is complete.

    What a killed process leaves under such a name is in nobody's way and can be deleted.
    """
    return path.with_name(f".{path.name[:40]}.{token_hex(4)}.tmp")  # names have up to 255 bytes


@contextmanager
def atomic_path(
    path: str | Path, move: Callable[[Path, Path], None] | None = None
) -> Iterator[Path]:
    """Yield a temporary path beside `path`.

    On success it is flushed to disk and renamed to `path` (or moved there by `move`), on failure
    it is deleted.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        yield temporary
        with open(temporary, "r+b") as file:  # Windows flushes only what is open for writing
            os.fsync(file.fileno())
        (move or os.replace)(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failing write or flush does not name it
        raise
    finally:
        temporary.unlink(missing_ok=True)


def flush_folder(folder: str | Path) -> None:
    """Flush a folder's list of names to disk, so that a rename survives a power cut."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: str | Path, value: dict) -> None:
    """Write an indented JSON object to `path` atomically."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def to_jsonl(lines: Iterable[dict]) -> str:
    """The text of a .jsonl file, with Chinese characters unescaped.

    Bytes of a file name that are no UTF-8, which Python keeps as lone surrogates, are escaped.
    """
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return text.encode(errors="backslashreplace").decode()  # as JSON writes them, too


def read_jsonl(path: Path) -> list[Any]:
    """Read a .jsonl file that nanovlm wrote, without a last line that was cut off.

    Raises NanoVLMError if it cannot be read, and ValueError for a line that is no JSON.
    """
    return [parse_json(line) for line in read_text(path).split("\n")[:-1]]


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading.

    A `NanoVLMError` says why it cannot be read. A pipe or a device is refused, because reading it
    may wait for ever or never end.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = next((kind for test, kind in _NOT_FILES if test(mode)), "not a file")
            raise NanoVLMError(f"{path}: is {kind}; give a regular file")
        return open(path, "rb")
    except OSError as error:
        raise NanoVLMError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except ValueError:  # a NUL, or half of a UTF-16 pair
        raise NanoVLMError(f"{path}: no file can have this name; check the path") from None


def read_bytes(path: str | Path, limit: int = MAX_TEXT) -> bytes:
    """Read a regular file of at most `limit` bytes; a `NanoVLMError` says why it cannot be read."""
    with open_regular(path) as file:
        try:
            data = file.read(limit + 1)
        except OSError as error:
            raise NanoVLMError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > limit:
        raise NanoVLMError(f"{path}: is larger than {limit:,} bytes; it cannot be the right file")
    return data


def read_text(path: str | Path, limit: int = MAX_TEXT) -> str:
    """Read a UTF-8 text file of at most `limit` bytes, without its byte order mark.

    Line ends of Windows become line feeds. A `NanoVLMError` says why it cannot be read, or what
    the file is if it is no text.
    """
    data = read_bytes(path, limit)
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        what = what_is(data[:FIRST_BYTES])
        what = None if what in ("JSON", "YAML", "TOML") else what  # damaged further on
        raise NanoVLMError(f"{path}: {_instead_of('UTF-8 text', what)}") from None


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises ValueError: JSONDecodeError, with the place, or without one for what is nested more than
    MAX_NESTING deep and for numbers of thousands of digits.
    """
    too_deep = f"nested more than {MAX_NESTING} deep"
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(too_deep) from None
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_NESTING):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, (dict, list))
        ]
    if level:
        raise ValueError(too_deep)
    return value


def read_json(path: str | Path) -> dict:
    """Read a JSON object; a `NanoVLMError` names the file and the place that is broken."""
    text = read_text(path)
    try:
        value = parse_json(text)
    except ValueError as error:
        what = what_is(text[:FIRST_BYTES].encode(errors="replace"))
        if what not in (None, "JSON"):
            raise NanoVLMError(f"{path}: {_instead_of('JSON', what)}") from None
        place, reason = "", str(error)
        if isinstance(error, json.JSONDecodeError):
            place, reason = f":{error.lineno}:{error.colno}", error.msg
        raise NanoVLMError(
            f"{path}{place}: is not valid JSON ({reason}); fetch or write the file again"
        ) from None
    if "\\ud" in text.lower() and not _is_writable(value):
        raise NanoVLMError(
            f"{path}: holds half of a character (a lone surrogate, such as \\ud800); "
            "fetch or write the file again"
        )
    if not isinstance(value, dict):
        raise NanoVLMError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


def _is_writable(value: Any) -> bool:
    """Whether UTF-8 can hold all texts in a value that JSON gave."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
        return True
    except UnicodeEncodeError:
        return False


def _instead_of(expected: str, what: str | None) -> str:
    return f"is not {expected}" + (f" but {what}" if what else "; was it damaged or compressed?")
