"""The one exception that users are meant to see, and what its message quotes or refers to."""

from typing import Any

MAX_QUOTED = 200  # characters of a value in a message


class NanoVLMError(Exception):
    """One line: what is wrong, where (file, line, tensor, key), and what to do about it.

    Further arguments are the lines of a list below it.
    """

    def __str__(self) -> str:
        return "\n".join(self.args)


def see(anchor: str) -> str:
    """Where the documentation says more about a message: a section of its troubleshooting page."""
    return f"see docs/en/troubleshooting.md#{anchor}"


def quoted(value: Any) -> str:
    """A value as it stands in a message: as Python writes it, cut after MAX_QUOTED characters."""
    text = repr(value)
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}…"
