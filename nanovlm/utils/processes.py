"""The processes of torchrun, and a command run in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from nanovlm.errors import NanoVLMError


def processes() -> tuple[int, int]:
    """Rank and world size from torchrun's environment variables; without torchrun, 0 and 1."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def processes_here() -> int:
    """How many of torchrun's processes are on this machine; without torchrun, 1."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is rank 0, the process that prints and writes files."""
    return processes()[0] == 0


def output_of(module: str, arguments: Sequence[str], task: str) -> Any:
    """The JSON that `python -m module arguments` prints, run in a process of its own.

    Its stderr is this process's. Raises NanoVLMError, naming `task` ("measures …"), if it fails.
    """
    command = [sys.executable, "-m", module, *arguments]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if child.returncode:
        raise NanoVLMError(f"the process that {task} ended with code {child.returncode}; see above")
    return json.loads(child.stdout)
