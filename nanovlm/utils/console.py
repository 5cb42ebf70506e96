"""What commands say to their user, and how they end: exit codes, and errors of one line."""

import os
import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from nanovlm.errors import NanoVLMError
from nanovlm.utils.processes import is_main, processes


def say(message: str) -> None:
    """Tell the user, once however many processes there are, above a progress bar if there is one; stdout is for answers."""
    if is_main():
        tqdm.write(message, file=sys.stderr)


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit: 0 when it returns, 2 with one line on stderr when its input or a disk was at fault.

    Ctrl-C exits 130, and a reader that closes our stdout (`infer.py … | head`) ends the command quietly.
    """
    status = _status_of(main)
    if processes()[1] > 1 and status:
        sys.stderr.flush()
        os._exit(
            status
        )  # no goodbye to other processes: they may wait for this one, and torchrun ends them
    sys.exit(status)


def _status_of(main: Callable[[], int | None]) -> int:
    try:
        status = main() or 0
        sys.stdout.flush()  # here, where a closed pipe is still caught
        return status
    except SystemExit as stopped:  # by a signal, with everything saved
        return stopped.code or 0
    except NanoVLMError as error:
        _tell(str(error))
        return 2
    except KeyboardInterrupt:
        if is_main():
            print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python flushes stdout once more at exit; give that flush somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
            _tell(
                f"out of memory ({first_line(error)}); `python -m nanovlm.memory --gpu GB` with the same flags says what fits"
            )
            return 2
        if processes()[1] == 1 or not (
            type(error).__module__ == "torch.distributed" or "gloo" in str(error)
        ):
            raise
        _tell(f"another process is gone, and its own error says why ({first_line(error)})")
        return 2
    except (
        OSError
    ) as error:  # a full disk, a folder that may not be written to, a name too long for the system
        _tell(f"{error.filename or 'the system'}: {error.strerror or error}")
        return 2


def first_line(error: Exception) -> str:
    """What an error of many lines begins with."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _tell(message: str) -> None:
    rank, world = processes()
    if rank > 0:
        time.sleep(
            3
        )  # what is wrong with all of them is said by rank 0, and torchrun has ended this one by then
    print("error" + (f" (rank {rank})" if world > 1 else "") + f": {message}", file=sys.stderr)
