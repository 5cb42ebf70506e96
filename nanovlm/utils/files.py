"""Reading and writing files; a crash at any moment leaves the old file or the new one, whole."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nanovlm.errors import NanoVLMError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`.

    On success it is flushed to disk and renamed to `path`, on failure it is deleted.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "r+b") as file:  # Windows flushes only what is open for writing
            os.fsync(file.fileno())
        os.replace(temporary, path)
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
    """The text of a .jsonl file, with Chinese characters unescaped."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def read_jsonl(path: Path) -> list[dict]:
    """Read a .jsonl file that nanovlm wrote, without a last line that was cut off."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def read_text(path: str | Path) -> str:
    """Read a text file; a `NanoVLMError` says why it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise NanoVLMError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise NanoVLMError(f"{path}: is not UTF-8 text; was it damaged or compressed?") from None


def read_json(path: str | Path) -> dict:
    """Read a JSON object; a `NanoVLMError` names the file and the line that is broken."""
    text, advice = read_text(path), "fetch or write the file again"
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise NanoVLMError(
            f"{path}:{error.lineno}: is not valid JSON ({error.msg}); {advice}"
        ) from None
    except (ValueError, RecursionError) as error:  # thousands of digits, or of nested lists
        raise NanoVLMError(
            f"{path}: is not usable JSON ({type(error).__name__}); {advice}"
        ) from None
    if not isinstance(value, dict):
        raise NanoVLMError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value
