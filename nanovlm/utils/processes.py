"""The rank of this process and the number of processes, as torchrun sets them."""

import os


def processes() -> tuple[int, int]:
    """Rank and world size from torchrun's environment variables; without torchrun, 0 and 1."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is rank 0, the process that prints and writes files."""
    return processes()[0] == 0
