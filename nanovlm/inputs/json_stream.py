"""JSON files larger than memory: the items of a list or an object, one at a time."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nanovlm.errors import NanoVLMError

CHUNK = 2**20  # bytes that are read at once
MAX_ITEM = 2**26  # characters of one item: a record with its image in base64
_SPACE = re.compile(r"[ \t\n\r]*")
_UNFINISHED = 20  # characters: an error this near to the end may be gone once more is read


def stream_json(path: Path, file: BinaryIO) -> Iterator[tuple[str | None, Any]]:
    """The items of the JSON list or object in an open file, each with its key (None in a list).

    Of an object, a value that is a list comes as its items, one by one, each with the list's key.
    Bytes that are no UTF-8 become lone surrogates. Raises NanoVLMError, with the file, line and
    column, at what is no valid JSON; the items before it have been given by then.
    """
    text = _Text(path, file)
    if text.next() != "{":
        for item in text.items():
            yield None, item
    else:
        for key in text.members():
            if text.next() == "[":
                for item in text.items():
                    yield key, item
            else:
                yield key, text.value()
    if text.next():
        text.fail("Extra data")


class _Text:
    """The text of a file, of which only the item that is being parsed is held."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._at, self._has_ended = "", 0, False
        self._line, self._column = 1, 1  # of the beginning of `_text`

    def next(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._text) or self._has_ended:
                return self._text[self._at : self._at + 1]
            self._read()

    def items(self) -> Iterator[Any]:
        """The items of a list."""
        self._expect("[")
        while self.next() != "]":
            yield self.value()
            self._separator("]")
        self._at += 1

    def members(self) -> Iterator[str]:
        """The keys of an object; the value of each has to be read before the next."""
        self._expect("{")
        while self.next() != "}":
            if self.next() != '"':
                self.fail("Expecting property name enclosed in double quotes")
            key = self.value()
            self._expect(":")
            yield key
            self._separator("}")
        self._at += 1

    def value(self) -> Any:
        """The next value, whole."""
        self.next()
        while True:
            try:
                value, end = self._parse(self._text, self._at)
                if end < len(self._text) or self._has_ended:  # a number may go on
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                is_whole = error.pos < len(self._text) - _UNFINISHED
                if self._has_ended or (is_whole and not error.msg.startswith("Unterminated")):
                    self._at = error.pos
                    self.fail(error.msg)
            except (ValueError, RecursionError):  # thousands of digits, or of nested lists
                raise NanoVLMError(
                    f"{self._path}: has a number or a nesting without end; remove it"
                ) from None
            if len(self._text) - self._at > MAX_ITEM:
                self.fail(f"an item of more than {MAX_ITEM >> 20} MiB")
            self._read()

    def fail(self, reason: str) -> None:
        """Raise NanoVLMError with the reason and the place that has been reached."""
        self._drop()
        raise NanoVLMError(
            f"{self._path}:{self._line}:{self._column}: is not valid JSON ({reason}); mend it "
            "there, or fetch the file again"
        )

    def _expect(self, character: str) -> None:
        if self.next() != character:
            self.fail(f"Expecting {character!r}")
        self._at += 1

    def _separator(self, closing: str) -> None:
        """Pass over the comma between two items, or stand before the end of all."""
        if self.next() == closing:
            return
        if self.next() != ",":
            self.fail("Expecting ',' delimiter")
        self._at += 1
        if self.next() in (closing, ""):
            self.fail("Expecting value")

    def _read(self) -> None:
        """Read on, twice as far each time, so that a long item is not parsed too often."""
        self._drop()
        data = self._file.read(max(CHUNK, len(self._text)))
        self._has_ended = not data
        self._text += self._decode(data, self._has_ended)

    def _drop(self) -> None:
        """Forget what has been read, and keep its line and column."""
        done = self._text[: self._at]
        if lines := done.count("\n"):
            self._line, self._column = self._line + lines, len(done) - done.rindex("\n")
        else:
            self._column += len(done)
        self._text, self._at = self._text[self._at :], 0
