"""The interface of all tokenizers, and what they share.

Lesson: lessons/source/05_conversations.py.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path


class Tokenizer(ABC):
    """Text to ids and back.

    `vocab_size` is the highest id + 1, `special_tokens` maps a special token's text to its id, and
    `puts_space` says whether a space is put before every text that is encoded, as LLaMA's does.
    """

    vocab_size: int
    special_tokens: dict[str, int]
    puts_space: bool = False

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a user's text, none of them special. A lone surrogate is read as U+FFFD."""

    @abstractmethod
    def encode_with_special(self, text: str) -> list[int]:
        """Ids of a text that the program wrote, in which special tokens are recognized."""

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int], skip_special: bool = False) -> bytes:
        """The UTF-8 bytes of ids; an id may hold part of a character, and an unused id is empty."""

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids, skip_special).decode("utf-8", errors="replace")

    @abstractmethod
    def add_special_token(self, text: str) -> int:
        """The id of the special token `text`, which gets the next free id if it is new."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write the files from which `load_tokenizer(folder)` makes an equal tokenizer."""


def spelling_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds the texts of tokens, the longest first; without tokens, nothing."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def without_surrogates(text: str) -> str:
    """The text with U+FFFD for each lone surrogate, which UTF-8 cannot hold."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\ufffd", text)
