"""What every tokenizer offers, and the little they share."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path


class Tokenizer(ABC):
    """What every tokenizer offers. `vocab_size` is the highest id + 1; `special_tokens` maps text to id; `puts_space` is
    whether each text that is encoded gets a space before it, as LLaMA's does."""

    vocab_size: int
    special_tokens: dict[str, int]
    puts_space: bool = False

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a user's text, none of them special. A lone surrogate, which is no character, is read as U+FFFD."""

    @abstractmethod
    def encode_with_special(self, text: str) -> list[int]:
        """Ids of a text written by the program, in which a special token's spelling means the token."""

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int], skip_special: bool = False) -> bytes:
        """The UTF-8 bytes of each id, joined. A character may be spread over several ids; unused ids give nothing."""

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids, skip_special).decode("utf-8", errors="replace")

    @abstractmethod
    def add_special_token(self, text: str) -> int:
        """The id of the special token `text`, which gets the next free id if it is new."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write the files from which `load_tokenizer(folder)` makes an equal tokenizer."""


def spelling_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds tokens as they are spelled, the longest first; without tokens it finds nothing."""
    return re.compile(
        "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or r"(?!)"
    )


def without_surrogates(text: str) -> str:
    """The text with U+FFFD for each lone surrogate, which UTF-8 cannot hold."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\ufffd", text)
