"""Ctrl-C (SIGINT) and a scheduler's SIGTERM: what a command does at any moment of its life.

Importing this module arms a command, so commands and the package do it before their slow imports:
until its `main` begins, and once it has ended, Ctrl-C ends the process at once, because nothing is
half done. For the same reason it imports little itself.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator


def end_at_once(number: int, _) -> None:
    """Handle a signal: one line, of rank 0, and exit code 128 + its number."""
    if os.environ.get("RANK", "").strip() in ("", "0"):
        with contextlib.suppress(OSError):  # stderr may be closed
            os.write(2, b"interrupted\n")
    os._exit(128 + number)


@contextlib.contextmanager
def raised_as_exception() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt within, so that what was begun is cleaned up."""
    previous = signal.getsignal(signal.SIGINT)
    if previous is not signal.SIG_IGN:  # as a shell starts what runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def kept_from_children() -> Iterator[None]:
    """Keep Ctrl-C from processes started within, from their first moment: this one ends them.

    Here it is put off to the end. (Windows cannot do that; there they have to ignore it.)
    """
    if os.name != "posix":
        yield
        return
    from multiprocessing import resource_tracker  # not at the start, which has to be quick

    resource_tracker.ensure_running()  # which the first process would start, and unblock signals
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


class Interrupted(BaseException):
    """A signal came while nothing was being done that has to be finished."""


class Interruption:
    """Keeps the first SIGINT or SIGTERM as `signal`, for the loop to check after each step.

    A second one exits at once, with 128 + its number. A process forked within ignores both: one
    that prepares batches is ended by its parent.
    """

    def __enter__(self) -> "Interruption":
        self.signal = 0  # the number of the signal received, or 0
        self._process = os.getpid()
        self._waiting = False
        self._previous = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    @contextlib.contextmanager
    def while_waiting(self) -> Iterator[None]:
        """Raise Interrupted at once within, and at the start for a signal that came before."""
        self._waiting = True
        try:
            if self.signal:
                raise Interrupted
            yield
        finally:
            self._waiting = False

    def _receive(self, number: int, _) -> None:
        if os.getpid() != self._process:
            return
        if self.signal:
            raise SystemExit(128 + number)
        self.signal = number
        if self._waiting:
            raise Interrupted

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _is_command() -> bool:
    """Whether this process runs `python -m nanovlm.NAME` or a script of this repository."""
    if sys.argv[:1] == ["-m"]:  # while Python looks for the module, for which it imports us
        return True
    root, script = __file__, getattr(sys.modules["__main__"], "__file__", None)
    for _ in range(3):  # from nanovlm/utils/ upwards
        root = os.path.dirname(root)
    folder, tools = os.path.dirname(os.path.abspath(script or "")), os.path.join(root, "data_tools")
    return bool(script) and (folder in (root, tools) or os.path.dirname(folder) == tools)


if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_at_once)
