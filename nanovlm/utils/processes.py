"""Which process of how many this one is, as torchrun says."""

import os


def processes() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun's environment says; without it, 0 of 1."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this process is the one that writes and talks."""
    return processes()[0] == 0
