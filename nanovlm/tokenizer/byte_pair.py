"""Byte-level byte-pair encoding, the tokenizer of GPT-2, Qwen and LLaMA 3.

A text is searched for added tokens, normalized (NFC), searched once more, and split into words
(`pretokenize.py`); the bytes of each word are merged into tokens (`merges.py`).
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nanovlm.errors import NanoVLMError, quoted
from nanovlm.tokenizer.base import Tokenizer, spelling_pattern, without_surrogates
from nanovlm.tokenizer.merges import BytePairEncoder, bytes_to_token, token_to_bytes
from nanovlm.tokenizer.pretokenize import nfc, pre_tokenize, read_normalizer, read_pre_tokenizer
from nanovlm.utils.config import check_number
from nanovlm.utils.files import write_atomically

MAX_ADDED = 2**14  # added tokens, each searched for in every text; published files have up to 6,000


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text by its spelling, before byte-pair encoding."""

    id: int
    content: str
    special: bool = True  # only the program may produce it
    normalized: bool = False  # searched for after NFC instead of before


class BytePairTokenizer(Tokenizer):
    """Byte-level byte-pair encoding, equal to the `tokenizers` package for any text.

    `encode` equals it with `encode_special_tokens = True`: added tokens that are not special
    (`<tool_call>`) are found in the text, special ones are encoded as ordinary text.
    `encode_with_special` equals it with `add_special_tokens=False`.

    Args:
        vocab: token to id; `merges.py` says how a token spells bytes.
        merges: pairs of tokens in the order they were learned.
        added_tokens: tokens that are found by their spelling.
        pipeline: the part of a `tokenizer.json` outside its model: `normalizer`,
            `pre_tokenizer`, …
        ignore_merges: a word that is a token becomes that token, whatever the merges say.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: Iterable[Sequence[str]],
        added_tokens: Iterable[AddedToken],
        pipeline: dict,
        ignore_merges: bool = False,
    ):
        if not isinstance(vocab, dict) or not all(
            type(id) is int and id >= 0 for id in vocab.values()
        ):
            raise NanoVLMError(
                "vocabulary: expected an object of tokens and whole numbers; damaged file?"
            )
        self._vocab, self._pipeline, self._ignore_merges = vocab, pipeline, ignore_merges
        self._tokens = {id: token for token, id in vocab.items()}
        if len(self._tokens) != len(vocab):
            raise NanoVLMError(
                f"vocabulary: {len(vocab) - len(self._tokens)} ids are used twice; damaged file?"
            )
        check_number("token_id", max(self._tokens, default=0), "vocabulary: the highest id", 0)
        self._use_nfc = read_normalizer(pipeline.get("normalizer"))
        self._word_patterns = read_pre_tokenizer(pipeline.get("pre_tokenizer"))
        self._encoder = BytePairEncoder(vocab, merges)
        self._added: dict[str, AddedToken] = {}
        self.special_tokens = {}
        self.vocab_size = max(self._tokens) + 1
        self._add(added_tokens)

    def _add(self, added_tokens: Iterable[AddedToken]) -> None:
        added_tokens = list(added_tokens)
        if len(added_tokens) > MAX_ADDED:
            raise NanoVLMError(f"{len(added_tokens)} added tokens; the limit is {MAX_ADDED}")
        for token in added_tokens:
            self._check_added(token)
            if token.special:
                self.special_tokens[token.content] = token.id
            self._added[token.content], self._tokens[token.id] = token, token.content
            self.vocab_size = max(self.vocab_size, token.id + 1)
        # As in `tokenizers`, some are searched for in the raw text, the others in the normalized.
        raw, normalized = {}, {}
        for token in self._added.values():
            if token.normalized:
                normalized[self._normalize(token.content)] = token
            else:
                raw[token.content] = token
        self._find_raw = (spelling_pattern(raw), raw)
        self._find_normalized = (spelling_pattern(normalized), normalized)

    def _check_added(self, token: AddedToken) -> None:
        name = f"added token {quoted(token.content)} with id {quoted(token.id)}"
        is_text = token.content and without_surrogates(token.content) == token.content
        if not is_text or token.id < 0:
            raise NanoVLMError(f"{name}: is no text, or below 0; damaged file?")
        check_number("token_id", token.id, f"{name}: the id", default=0)
        if self._tokens.get(token.id, token.content) != token.content:
            raise NanoVLMError(
                f"{name}: {quoted(self._tokens[token.id])} has the same id; damaged file?"
            )
        if self._vocab.get(token.content, token.id) != token.id or token.content in self._added:
            raise NanoVLMError(f"{name}: is already in the vocabulary; choose another text")
        if token.special and token.id in self._encoder.reachable:
            raise NanoVLMError(
                f"{name}: is special, yet ordinary text gives that id too; choose another text"
            )

    def encode(self, text: str) -> list[int]:
        return self._encode(text, special=False)

    def encode_with_special(self, text: str) -> list[int]:
        return self._encode(text, special=True)

    def _encode(self, text: str, special: bool) -> list[int]:
        ids: list[int] = []
        for segment in self._split_added(without_surrogates(text), self._find_raw, special):
            if isinstance(segment, int):
                ids.append(segment)
                continue
            normalized = self._normalize(segment)
            for piece in self._split_added(normalized, self._find_normalized, special):
                if isinstance(piece, int):
                    ids.append(piece)
                    continue
                for word in pre_tokenize(piece, self._word_patterns):
                    ids += self._encode_word(word)
        return ids

    @staticmethod
    def _split_added(text: str, find: tuple, special: bool) -> Iterator[str | int]:
        """The text between added tokens, and the ids of those tokens."""
        pattern, tokens = find
        start = 0
        for match in pattern.finditer(text):
            token = tokens[match[0]]
            if special or not token.special:
                yield text[start : match.start()]
                yield token.id
                start = match.end()
        yield text[start:]

    def _normalize(self, text: str) -> str:
        return nfc(text) if self._use_nfc else text

    def _encode_word(self, word: str) -> list[int]:
        if self._ignore_merges:
            token = bytes_to_token(word.encode())
            if token in self._vocab and token not in self.special_tokens:
                return [self._vocab[token]]
        return self._encoder.encode(word)

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = False) -> bytes:
        skipped = self.special_tokens if skip_special else ()
        tokens = (self._tokens.get(id, "") for id in ids)
        return b"".join(token_to_bytes(token) for token in tokens if token not in skipped)

    def add_special_token(self, text: str) -> int:
        if text not in self.special_tokens:
            self._add([AddedToken(self.vocab_size, text)])
        return self.special_tokens[text]

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json`, which the `tokenizers` package reads too."""
        flags = {"single_word": False, "lstrip": False, "rstrip": False}
        added_tokens = sorted(self._added.values(), key=lambda token: token.id)
        tokens = self._tokens
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": self._ignore_merges,
            "vocab": self._vocab,
            "merges": [f"{tokens[left]} {tokens[right]}" for left, right in self._encoder.pairs],
        }
        document = {
            "version": "1.0",
            "post_processor": None,
            **self._pipeline,
            "truncation": None,
            "padding": None,
            "added_tokens": [asdict(token) | flags for token in added_tokens],
            "model": model,
        }
        write_atomically(Path(folder) / "tokenizer.json", json.dumps(document, ensure_ascii=False))
