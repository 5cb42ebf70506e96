"""The processes of torchrun, and a command run in a process of its own."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from nanovlm.errors import NanoVLMError, quoted
from nanovlm.utils.interruption import kept_from_children


def processes() -> tuple[int, int]:
    """Rank and world size from torchrun's environment variables; without torchrun, 0 and 1."""
    rank, world_size = _from_torchrun("RANK", 0), _from_torchrun("WORLD_SIZE", 1)
    if rank >= world_size:
        raise NanoVLMError(
            f"RANK is {rank} and WORLD_SIZE {world_size} in the environment, so there is no such "
            "process; unset both, or start the command with torchrun, which sets them"
        )
    return rank, world_size


def processes_here() -> int:
    """How many of torchrun's processes are on this machine; all, where it does not say."""
    return max(1, _from_torchrun("LOCAL_WORLD_SIZE", processes()[1]))


def rank_here() -> int:
    """Which of torchrun's processes on this machine this is; without torchrun, 0."""
    return _from_torchrun("LOCAL_RANK", 0)


def _from_torchrun(name: str, default: int) -> int:
    """The number that a variable holds. One that is set but empty counts as unset."""
    text = os.environ.get(name, "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return int(text)
    if text:
        raise NanoVLMError(
            f"{name} is {quoted(text)} in the environment, expected a number; "
            "unset it, or start the command with torchrun, which sets it"
        )
    return default


def is_main() -> bool:
    """Whether this is rank 0, the process that prints and writes files."""
    return processes()[0] == 0


def output_of(module: str, arguments: Sequence[str], task: str) -> Any:
    """The JSON that `python -m module arguments` prints, run in a process of its own.

    Its stderr is this process's. Raises NanoVLMError, naming `task` ("measures …"), if it fails.
    """
    command = [sys.executable, "-m", module, *arguments]
    with kept_from_children():  # so that one of the two says it was interrupted
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    try:
        output, _ = child.communicate()
    finally:
        child.kill()
    if child.returncode:
        raise NanoVLMError(f"the process that {task} ended with code {child.returncode}; see above")
    return json.loads(output)
