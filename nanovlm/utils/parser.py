"""The argument parser of every command: no abbreviations, and errors of one line."""

import argparse
import re
from typing import NoReturn

from nanovlm.errors import NanoVLMError
from nanovlm.utils.config import RENAMED


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are one `NanoVLMError` that names the flag."""

    def __init__(self, **options) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        for old, new in ((f"--{flag.replace('_', '-')}", name) for flag, name in RENAMED.items()):
            if message.startswith("unrecognized") and re.search(
                rf"(?<!\S){old}(?=[\s=]|$)", message
            ):
                raise NanoVLMError(f"{old} is now --{new.replace('_', '-')}")
        raise NanoVLMError(f"{message}; --help lists the flags")
