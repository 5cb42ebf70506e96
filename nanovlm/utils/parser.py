"""The argument parser of every command: no abbreviations, one-line errors."""

import argparse
import math
import os
import re
from pathlib import Path
from typing import Any, NoReturn

from nanovlm.errors import MAX_QUOTED, NanoVLMError
from nanovlm.utils.config import RENAMED, RENAMED_VALUES, check_number


def flag(name: str) -> str:
    """How a setting is spelled on a command line."""
    return f"--{name.replace('_', '-')}"


def expand_user(text: str) -> str:
    """A path, or several with commas, with `~` at its beginning replaced by the home folder.

    Shells do that themselves, but not in `--out=~/runs` or within quotes, and files hold it as it
    was typed.
    """
    return re.sub(r"(?<![^,])(\s*)(~[^/\\,]*)", lambda m: m[1] + os.path.expanduser(m[2]), text)


class CommandParser(argparse.ArgumentParser):
    """An argument parser that raises `NanoVLMError`, naming the flag, instead of exiting.

    A flag or a value that has been renamed is refused with its new name. In flags of type Path, `~`
    is the home folder.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.register("type", Path, lambda text: Path(os.path.expanduser(text)))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse does, but a number has to be finite and not beyond the limits of its name.

        Whether it may be 0 or below, each command says.
        """
        namespace, unknown = super().parse_known_args(args, namespace)
        for action in self._actions:
            value = getattr(namespace, action.dest, None)
            if not isinstance(value, (int, float)) or not -math.inf < value <= 0:
                check_number(action.dest, value, flag(action.dest))
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized"):
            for old, new in RENAMED.items():
                if re.search(rf"(?<!\S){flag(old)}(?=[\s=]|$)", message):
                    raise NanoVLMError(f"{flag(old)} is now {flag(new)}")
        choice = re.fullmatch(r"argument (\S+): invalid choice: '(\w+)' .*", message)
        if choice and (new := RENAMED_VALUES.get(choice[2])):
            raise NanoVLMError(f"{choice[1]} {choice[2]} is now {choice[1]} {new}")
        message = re.sub(rf"(\S{{{MAX_QUOTED}}})\S+", r"\1…", message)  # no word is longer
        raise NanoVLMError(f"{message}; --help lists the flags")
