"""Messages of the commands, and how a command ends: its exit code and its one-line errors."""

import contextlib
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from tqdm import tqdm

from nanovlm.errors import NanoVLMError, see
from nanovlm.utils import interruption
from nanovlm.utils.processes import is_main, processes

MAX_LINE = 1000  # characters of a message
# Also what separates lines, or reverses the order of characters, and halves of UTF-16 pairs.
_CONTROL_CHARACTER = re.compile(
    "[\0-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def say(*lines: str) -> None:
    """Print lines to stderr from rank 0, above any progress bar; stdout is for answers.

    What stands in a line stays within it: control characters are escaped.
    """
    if is_main():
        tqdm.write("\n".join(map(printable, lines)), file=sys.stderr)


def printable(line: str) -> str:
    """A line as the terminal may get it: control characters escaped, the middle of a long one cut.

    The place of an error stands at its beginning, and the reason at its end.
    """
    if len(line) > MAX_LINE:
        half = MAX_LINE // 2
        line = f"{line[:half]} … {len(line) - 2 * half:,} characters … {line[-half:]}"
    return _CONTROL_CHARACTER.sub(lambda found: found[0].encode("unicode_escape").decode(), line)


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit with its status.

    0 when it returns None; 2, with one line on stderr, when its input, the memory or a disk was at
    fault; 130 on Ctrl-C; 141, quietly, when the reader closes our stdout (`infer.py … | head`).
    """
    _set_up_streams()
    status = _status_of(main)
    try:
        sys.stdout.flush()
    except OSError:
        # Python flushes it once more at exit, and a failure there would change the exit code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if _processes()[1] > 1:
        # No clean-up between processes: it would wait for this one, or abort it, if a thread of the
        # connection is still there. After an error torchrun ends the others.
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


class _Stream:
    """stdout, whose errors are named, or stderr, on which no message fails.

    A log on a full disk, or a terminal that is gone, ends no run.
    """

    def __init__(self, stream: TextIO, *, may_fail: bool) -> None:
        self._stream, self._may_fail = stream, may_fail

    def write(self, text: str) -> int:
        with self._errors():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._errors():
            self._stream.flush()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = "stdout"
            if self._may_fail:
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _set_up_streams() -> None:
    """UTF-8, whatever the console says, and something in place of a stream that is closed.

    A closed stdin is empty, and a closed stderr takes everything. Writing to a closed stdout fails,
    as to a full disk, so that no answer is lost without a word.
    """
    for name, flags, mode in (
        ("stdin", os.O_RDONLY, "r"),
        ("stdout", os.O_RDONLY, "w"),
        ("stderr", os.O_WRONLY, "w"),
    ):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, flags), mode))
        stream = getattr(sys, name)
        if mode == "w" and isinstance(stream, io.TextIOWrapper):  # no notebook's or test's own
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    sys.stdout = _Stream(sys.stdout, may_fail=True)
    sys.stderr = _Stream(sys.stderr, may_fail=False)


def _status_of(main: Callable[[], int | None]) -> int:
    try:
        with interruption.raised_as_exception():
            processes()  # refuses numbers of torchrun that make no sense
            status = main() or 0
        sys.stdout.flush()  # here, where a closed pipe is still caught
        return status
    except SystemExit as stopped:  # --help, or a signal after everything was saved
        return int(stopped.code or 0)
    except KeyboardInterrupt:
        if is_main():
            print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except NanoVLMError as error:
        _print_error(*error.args)
        return 2
    except Exception as error:
        message = _message_of(error)
        if message is None:
            raise
        _print_error(message)
        return 2


def _message_of(error: Exception) -> str | None:
    """One line about an error that the user can do something about; None for a bug."""
    if isinstance(error, OSError):  # a full disk, a folder without write permission, a long name
        return f"{error.filename or 'the system'}: {error.strerror or error}"
    if not isinstance(error, (RuntimeError, MemoryError)):
        return None
    is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if is_memory or "can't allocate memory" in str(error):
        return (
            f"out of memory ({first_line(error)}); "
            "`python -m nanovlm.memory --gpu GB` with the same flags says what fits; "
            f"{see('out-of-memory')}"
        )
    operation, lacks, _ = first_line(error).partition(" does not have a deterministic impl")
    if lacks:
        return (
            f"--deterministic: {operation} has no version here that gives the same bits in every "
            "run; take --no-deterministic, or another --device"
        )
    _, world_size = processes()
    from_backend = type(error).__module__ == "torch.distributed" or "gloo" in str(error)
    if world_size > 1 and from_backend:
        return f"another process is gone, and its own error says why ({first_line(error)})"
    return None


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _print_error(first: str, *others: str) -> None:
    rank, world_size = _processes()
    if rank > 0:
        # Rank 0 reports what is wrong everywhere, and torchrun has ended this process by then.
        time.sleep(3)
    of_rank = f" (rank {rank})" if world_size > 1 else ""
    lines = (f"error{of_rank}: {first}", *others)
    print("\n".join(map(printable, lines)), file=sys.stderr)


def _processes() -> tuple[int, int]:
    """As `processes`, but a single one where the environment makes no sense."""
    try:
        return processes()
    except NanoVLMError:
        return 0, 1
