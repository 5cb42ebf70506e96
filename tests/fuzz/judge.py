"""What becomes of an input: it is read, or refused in one clear line; anything else is a fault."""

import contextlib
import io
import os
import re
import signal
import sys
import traceback
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

from tqdm import tqdm

import nanovlm
from nanovlm.utils.console import run_command
from tests.fuzz.inputs import STDIN, FaultError, Input, Kind

SECONDS = 20  # after which an input hangs
MEMORY = 2 * 2**30  # bytes that reading one may take
LONGEST_LINE = 5000  # characters of a message
REPOSITORY = Path(nanovlm.__file__).parents[1]


class HangError(BaseException):
    """Raised by the clock; no `except Exception` stops it."""


@dataclass(frozen=True)
class Verdict:
    """`outcome` is read, refused or failed; `reason` is alike for failures of one cause."""

    outcome: str
    reason: str = ""
    details: str = ""


def judge(kind: Kind, input: Input) -> Verdict:
    """Write the input to a folder, read it there, and judge what happened."""
    with TemporaryDirectory(prefix="fuzz-") as parent:
        folder = Path(parent) / "input"
        input.write(folder)
        status, error, printed = _run(kind, input, folder)
        if error is not None:
            details = "".join(traceback.format_exception(error, limit=-6))
            return Verdict("failed", _cause(error), details)
        if fault := _fault_of_messages(status, printed):
            return Verdict("failed", fault, printed)
        try:
            kind.check(input, folder, status == 0)
        except FaultError as fault:
            return Verdict("failed", str(fault), printed)
        return Verdict("refused" if status else "read", printed.strip())


def _run(kind: Kind, input: Input, folder: Path) -> tuple[int, BaseException | None, str]:
    """The exit status of a command that reads the input, what it raised, and its stderr."""
    stdin = input.files.get(STDIN, b"")
    assert isinstance(stdin, bytes)
    buffers = [io.BytesIO(stdin), io.BytesIO(), io.BytesIO()]
    options = {"encoding": "utf-8", "errors": "backslashreplace", "write_through": True}
    streams = [io.TextIOWrapper(buffer, **options) for buffer in buffers]
    status, error = 1, None
    try:
        with contextlib.chdir(folder), _streams(*streams), _limits():
            run_command(lambda: kind.read(input))
    except SystemExit as ended:
        status = int(ended.code or 0)
        if status == 130:
            raise KeyboardInterrupt from None
    except (Exception, HangError) as raised:
        error = raised
    return status, error, buffers[2].getvalue().decode(errors="replace")


@contextlib.contextmanager
def _streams(stdin: io.TextIOWrapper, stdout: io.TextIOWrapper, stderr: io.TextIOWrapper):
    """Take the place of the standard streams and of the home folder; show no progress bars."""
    with (
        mock.patch.multiple(sys, stdin=stdin, stdout=stdout, stderr=stderr),
        mock.patch.dict(os.environ, HOME=os.getcwd()),
        mock.patch.multiple(tqdm, display=lambda *_, **__: None, clear=lambda *_, **__: None),
    ):
        yield


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Raise HangError after SECONDS, and MemoryError beyond MEMORY."""

    def hangs(*_) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, hangs)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with _limited_memory():
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    if not sys.platform.startswith("linux"):  # elsewhere the limit has no effect
        yield
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _cause(error: BaseException) -> str:
    """The kind of an error, and the function of ours that it came from."""
    if isinstance(error, FaultError):
        return str(error)
    frames = [
        (Path(each.filename), each.name) for each in traceback.extract_tb(error.__traceback__)
    ]
    where = "the fuzzer"
    for path, name in frames:
        if "tests" in path.parts and name != "hangs":
            where = "the fuzzer"
        elif {"nanovlm", "data_tools"} & {*path.parts}:
            where = f"{path.name}, {name}"
    return f"{type(error).__name__} in {where}"


def _fault_of_messages(status: int, printed: str) -> str:
    """What is wrong with the messages of a command that has ended; empty if nothing is."""
    lines = [line for line in printed.split("\n") if line.strip("\r")]
    errors = [number for number, line in enumerate(lines) if line.startswith("error")]
    if status not in (0, 2):
        return f"exit code {status}"
    if len(errors) != (status == 2):
        return f"exit code {status} and {len(errors)} lines that begin with error"
    if status == 2 and not all(line.startswith("  ") for line in lines[errors[0] + 1 :]):
        return "the error is not one line, with details indented below it"
    if any(unicodedata.category(character) == "Cc" for line in lines for character in line):
        return "a control character in a message"
    if (longest := max(map(len, lines), default=0)) > LONGEST_LINE:
        return f"a message of {longest} characters"
    if re.search("MemoryError|out of memory", printed):
        return "more memory than it may take"
    return ""
