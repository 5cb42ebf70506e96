"""SentencePiece models (LLaMA); the `sentencepiece` package does the encoding.

The package finds a model's user-defined symbols in any text, so that a user could type one (even in
full-width letters, which normalization turns into ASCII). They are therefore given to the package
as control symbols, which it never finds in a text: one byte per symbol is changed in memory, and
the user's spelling of one is encoded as ordinary text.

Lesson: lessons/source/04_tokenizers.py.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from nanovlm.errors import NanoVLMError, quoted
from nanovlm.tokenizer.base import Tokenizer, spelling_pattern, without_surrogates
from nanovlm.utils.files import read_bytes, read_json, write_atomically
from nanovlm.utils.sniff import what_is

MODEL_FILE, ADDED_TOKENS_FILE = "tokenizer.model", "added_tokens.json"
SPACE = "\u2581"  # how a piece spells a space
# Types of pieces, and the field numbers below, from sentencepiece_model.proto.
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """A protocol-buffers integer (seven bits a byte, low bits first) and the position after it."""
    value = shift = 0
    for _ in range(10):  # an integer of 64 bits has no more
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError("an integer does not end")


def fields(message: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of the value of each field of a protocol-buffers message."""
    while start < end:
        key, start = _varint(message, start)
        kind = key & 7
        if kind == 0:
            stop = _varint(message, start)[1]
        elif kind == 2:
            length, start = _varint(message, start)
            stop = start + length
        elif kind in (1, 5):
            stop = start + (8 if kind == 1 else 4)
        else:
            raise ValueError(f"unknown kind of field {kind}")
        if stop > end:
            raise ValueError("a field ends outside its message")
        yield key >> 3, start, stop
        start = stop


def _read_model(model: bytes) -> tuple[list[tuple[str, int]], bool, bytes]:
    """Text and type of each piece, whether a space is put first, and the patched model.

    In the patched model user-defined pieces are control pieces.
    """
    pieces, patched = [], bytearray(model)
    # add_dummy_prefix and remove_extra_whitespaces: true unless the model says otherwise.
    puts_space = {3: True, 4: True}
    for part, start, end in fields(model, 0, len(model)):
        if part == 1:  # a piece
            piece, kind = "", 1
            for field, first, last in fields(model, start, end):
                if field == 1:
                    piece = model[first:last].decode()
                elif field == 3:
                    kind = model[first]
                    patched[first] = CONTROL if kind == USER_DEFINED else kind
            if kind == BYTE and not re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece):
                raise ValueError(f"{quoted(piece)} is not a byte")
            pieces.append((piece, kind))
        elif part == 3:  # the normalizer
            for field, first, _ in fields(model, start, end):
                if field in puts_space:
                    puts_space[field] = bool(model[first])
    if not pieces:
        raise ValueError("it holds no pieces")
    return pieces, any(puts_space.values()), bytes(patched)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model.

    Its special tokens are the control, unknown and user-defined pieces, and those added. A model
    trained with `add_dummy_prefix` puts a space before every text that is encoded, so before each
    segment of a conversation. `decode` drops the first of these spaces, `decode_bytes`, which may
    be given one id at a time, none. Training with `add_dummy_prefix=False,
    remove_extra_whitespaces=False` avoids them. Without byte fallback (`byte_fallback`) a character
    outside the vocabulary becomes `<unk>`, the only special id that a user's text can give.
    """

    def __init__(self, model: bytes, added_tokens: dict[str, int] | None = None):
        self.model = model
        try:
            self._pieces, self.puts_space, patched = _read_model(model)
            self._processor = SentencePieceProcessor(model_proto=patched)
        except (ValueError, IndexError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise NanoVLMError(f"is not a SentencePiece model, or damaged ({reason})") from None
        self.special_tokens = {
            piece: id
            for id, (piece, kind) in enumerate(self._pieces)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        }
        self._texts = {id: text for text, id in self.special_tokens.items()}
        self._spellings = spelling_pattern(self.special_tokens)
        self.vocab_size = len(self._pieces)
        self._ordinary = {piece for piece, kind in self._pieces} - self.special_tokens.keys()
        self._added: dict[str, int] = {}
        for text, id in sorted((added_tokens or {}).items(), key=lambda item: item[1]):
            if (next_id := self.add_special_token(text)) != id:
                raise NanoVLMError(
                    f"{ADDED_TOKENS_FILE}: {quoted(text)} has id {id}, expected {next_id}; "
                    "is it another model's?"
                )

    @classmethod
    def from_file(
        cls, path: str | Path, added_tokens: dict[str, int] | None = None
    ) -> "SentencePieceTokenizer":
        """Read a model file and, if there is one, the `added_tokens.json` beside it.

        `added_tokens` (text to id) come from another file and may repeat the model's own.
        """
        path = Path(path)
        added_path = path.with_name(ADDED_TOKENS_FILE)
        added_tokens = (added_tokens or {}) | (read_json(added_path) if added_path.exists() else {})
        if not all(type(id) is int for id in added_tokens.values()):
            raise NanoVLMError(
                f"{added_path}: expected an object of texts and whole numbers; damaged file?"
            )
        model = read_bytes(path)
        try:
            return cls(model, added_tokens)
        except NanoVLMError as error:
            what = what_is(model)
            other = what not in (None, "a SentencePiece model")
            problem = f"is not a SentencePiece model but {what}" if other else error
            raise NanoVLMError(f"{path}: {problem}") from None

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(without_surrogates(text))

    def encode_with_special(self, text: str) -> list[int]:
        ids, start = [], 0
        for match in self._spellings.finditer(text):
            ids += self.encode(text[start : match.start()])
            ids.append(self.special_tokens[match[0]])
            start = match.end()
        return ids + self.encode(text[start:])

    def _bytes(self, id: int, skip_special: bool) -> bytes:
        if id in self._texts:
            return b"" if skip_special else self._texts[id].encode()
        if not 0 <= id < len(self._pieces):
            return b""
        piece, kind = self._pieces[id]
        return bytes([int(piece[1:-1], 16)]) if kind == BYTE else piece.replace(SPACE, " ").encode()

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = False) -> bytes:
        return b"".join(self._bytes(id, skip_special) for id in ids)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of ids, without the space that the model puts before a text."""
        text = super().decode(ids, skip_special)
        return text.removeprefix(" ") if self.puts_space else text

    def add_special_token(self, text: str) -> int:
        if text not in self.special_tokens:
            if not text or without_surrogates(text) != text:
                raise NanoVLMError(f"special token {quoted(text)}: is no text; give it one")
            if text in self._ordinary:
                raise NanoVLMError(
                    f"special token {quoted(text)}: ordinary text gives that piece too; "
                    "choose another text"
                )
            self.special_tokens[text] = self._added[text] = self.vocab_size
            self._texts[self.vocab_size] = text
            self._spellings = spelling_pattern(self.special_tokens)
            self.vocab_size += 1
        return self.special_tokens[text]

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.model`, byte for byte as it was read, and `added_tokens.json`."""
        folder = Path(folder)
        write_atomically(folder / ADDED_TOKENS_FILE, json.dumps(self._added, ensure_ascii=False))
        write_atomically(folder / MODEL_FILE, self.model)
