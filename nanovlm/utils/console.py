"""Messages of the commands, and how a command ends: its exit code and its one-line errors."""

import os
import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from nanovlm.errors import NanoVLMError
from nanovlm.utils.processes import is_main, processes


def say(message: str) -> None:
    """Print a message to stderr from rank 0, above any progress bar; stdout is for answers."""
    if is_main():
        tqdm.write(message, file=sys.stderr)


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit with its status.

    0 when it returns None; 2, with one line on stderr, when its input, the memory or a disk was at
    fault; 130 on Ctrl-C; 141, quietly, when the reader closes our stdout (`infer.py … | head`).
    """
    status = _status_of(main)
    _, world_size = processes()
    if world_size > 1 and status:
        # No clean-up between processes: it would wait for this one. torchrun ends the others.
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _status_of(main: Callable[[], int | None]) -> int:
    try:
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
        # Python flushes stdout once more at exit; give that flush somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        message = _message_of(error)
        if message is None:
            raise
        _print_error(message)
        return 2


def _message_of(error: Exception) -> str | None:
    """One line about an error that the user can do something about; None for a bug."""
    if isinstance(error, NanoVLMError):
        return str(error)
    if isinstance(error, OSError):  # a full disk, a folder without write permission, a long name
        return f"{error.filename or 'the system'}: {error.strerror or error}"
    if not isinstance(error, RuntimeError):
        return None
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return (
            f"out of memory ({first_line(error)}); "
            "`python -m nanovlm.memory --gpu GB` with the same flags says what fits"
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


def _print_error(message: str) -> None:
    rank, world_size = processes()
    if rank > 0:
        # Rank 0 reports what is wrong everywhere, and torchrun has ended this process by then.
        time.sleep(3)
    print("error" + (f" (rank {rank})" if world_size > 1 else "") + f": {message}", file=sys.stderr)
