"""Writing files so that a crash at any moment leaves either the old file or the new one, never half of one."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nanovlm.errors import NanoVLMError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it to `path`, on failure delete it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "r+b") as file:  # Windows flushes only what is open for writing
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(
            path
        )  # a failing write or flush does not know which file it was about
        raise
    finally:
        temporary.unlink(missing_ok=True)


def flush_folder(folder: str | Path) -> None:
    """Have the system write down which names a folder holds, so that a rename outlives a power cut."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `path` in one step."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: str | Path, value: dict) -> None:
    """Write a JSON object for people to read, in one step."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def to_jsonl(lines: Iterable[dict]) -> str:
    """One JSON object a line, Chinese as it is read."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def read_jsonl(path: Path) -> list[dict]:
    """The whole lines of a .jsonl file of our own; what follows the last end of a line was cut off while it was written."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def read_json(path: str | Path) -> dict:
    """Read a JSON object, or say in one line which file is missing or at which line it is broken."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NanoVLMError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise NanoVLMError(f"{path}: is not UTF-8 text; was it damaged or compressed?") from None
    except json.JSONDecodeError as error:
        raise NanoVLMError(
            f"{path}:{error.lineno}: is not valid JSON ({error.msg}); fetch or write the file again"
        ) from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # a number of thousands of digits, or lists nested as deep
        raise NanoVLMError(
            f"{path}: is not usable JSON ({type(error).__name__}); fetch or write the file again"
        ) from None
    if not isinstance(value, dict):
        raise NanoVLMError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value
