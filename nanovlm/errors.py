"""Errors a user can act on, and how a command ends with one."""

import os
import sys
from collections.abc import Callable


class NanoVLMError(Exception):
    """One line that says what was wrong, where (file, line, tensor, key), and what to do about it."""


def run(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit: 0 when it returns, 2 with one line on stderr when the input was at fault.

    Ctrl-C exits 130, and a reader that closes our stdout (`infer.py … | head`) ends the command quietly.
    """
    try:
        sys.exit(main() or 0)
    except NanoVLMError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # Python flushes stdout once more at exit; give that flush somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
