"""Errors a user can act on, and how a command ends with one."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class NanoVLMError(Exception):
    """One line that says what was wrong, where (file, line, tensor, key), and what to do about it."""


class CommandParser(argparse.ArgumentParser):
    """An argument parser that knows no abbreviations and whose errors are one line, as all others are."""

    def __init__(self, **options) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise NanoVLMError(f"{message}; --help lists the flags")


def run(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit: 0 when it returns, 2 with one line on stderr when its input or a disk was at fault.

    Ctrl-C exits 130, and a reader that closes our stdout (`infer.py … | head`) ends the command quietly.
    """
    try:
        status = main() or 0
        sys.stdout.flush()  # here, where a closed pipe is still caught
        sys.exit(status)
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
    except OSError as error:  # a full disk, a folder that may not be written to, a name too long for the system
        print(f"error: {error.filename or 'the system'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
