"""Byte-pair tokenizers, read from the files that Qwen and its relatives are published with."""

import base64
import binascii
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from nanovlm.errors import NanoVLMError
from nanovlm.tokenizer.base import Tokenizer, spelling_pattern, without_surrogates
from nanovlm.tokenizer.merges import BytePairEncoder, merge, spell, unspell
from nanovlm.tokenizer.pretokenize import (
    QWEN_PATTERN,
    check_settings,
    cut,
    nfc,
    read_pre_tokenizer,
    reads_nfc,
)
from nanovlm.utils.files import read_json, write_atomically


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name before what was wrong in it, be it a setting or the shape of the JSON."""
    try:
        yield
    except NanoVLMError as error:
        raise NanoVLMError(f"{path}: {error}") from None
    except (AttributeError, KeyError, TypeError) as error:
        raise NanoVLMError(
            f"{path}: is not laid out as such a file should be ({error}); damaged file?"
        ) from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise NanoVLMError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise NanoVLMError(f"{path}: is not UTF-8 text; was it damaged or compressed?") from None


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text as it is spelled, before byte-pair encoding."""

    id: int
    content: str
    special: bool = True  # only the program may produce it
    normalized: bool = False  # looked for after NFC, not before

    @classmethod
    def from_json(cls, spec: dict) -> "AddedToken":
        """Read an entry of `added_tokens`."""
        if (
            not isinstance(spec, dict)
            or type(spec.get("id")) is not int
            or not isinstance(spec.get("content"), str)
        ):
            raise NanoVLMError(f"added token {spec!r:.80} has no id or content; damaged file?")
        check_settings(
            f"added token {spec['content']!r}", spec, id=None, content=None, special=(True, False),
            normalized=(True, False), single_word=(False,), lstrip=(False,), rstrip=(False,),
        )  # fmt: skip
        special = spec.get("special", False)
        return cls(spec["id"], spec["content"], special, spec.get("normalized", not special))


class BytePairTokenizer(Tokenizer):
    """Byte-level byte-pair encoding, equal to the `tokenizers` package for any text.

    `encode` equals it with `encode_special_tokens = True`: added tokens that are not special (`<tool_call>`) are found
    in the text, special ones are spelled out. `encode_with_special` equals it with `add_special_tokens=False`.

    Args:
        vocab: token to id; `merges.py` says how a file spells bytes.
        merges: pairs of tokens, first learned first.
        added_tokens: found as they are spelled.
        pipeline: `normalizer`, `pre_tokenizer` and what else stands in a `tokenizer.json` outside its model.
        ignore_merges: a word that is a token is that token, whether merges lead there or not.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: Iterable[tuple[str, str]],
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
        self._nfc = reads_nfc(pipeline.get("normalizer"))
        self._patterns = read_pre_tokenizer(pipeline.get("pre_tokenizer"))
        self._encoder = BytePairEncoder(vocab, merges)
        self._added: dict[str, AddedToken] = {}
        self.special_tokens = {}
        self.vocab_size = max(self._tokens) + 1
        self._add(added_tokens)

    def _add(self, added_tokens: Iterable[AddedToken]) -> None:
        for token in added_tokens:
            what = f"added token {token.content!r} with id {token.id}"
            if not token.content or token.id < 0:
                raise NanoVLMError(f"{what}: is empty, or below 0; damaged file?")
            if self._tokens.get(token.id, token.content) != token.content:
                raise NanoVLMError(
                    f"{what}: {self._tokens[token.id]!r} has the same id; damaged file?"
                )
            if self._vocab.get(token.content, token.id) != token.id or token.content in self._added:
                raise NanoVLMError(f"{what}: is already in the vocabulary; choose another text")
            if token.special:
                if token.id in self._encoder.reachable:
                    raise NanoVLMError(
                        f"{what}: is special, yet ordinary text gives that id too; choose another text"
                    )
                self.special_tokens[token.content] = token.id
            self._added[token.content], self._tokens[token.id] = token, token.content
            self.vocab_size = max(self.vocab_size, token.id + 1)
        # Two rounds as in `tokenizers`: spellings looked for in the text as it came, then in the normalized text.
        raw = {token.content: token for token in self._added.values() if not token.normalized}
        normalized = {
            self._normalize(token.content): token
            for token in self._added.values()
            if token.normalized
        }
        self._rounds = [(spelling_pattern(raw), raw), (spelling_pattern(normalized), normalized)]

    @classmethod
    def from_tokenizer_json(cls, path: str | Path) -> "BytePairTokenizer":
        """Read the single file of the `tokenizers` package; a setting that is not implemented is refused."""
        path = Path(path)
        document = read_json(path)
        with _naming(path):
            model = document.pop("model", None)
            if (
                not isinstance(model, dict)
                or model.get("type", "BPE") != "BPE"
                or "merges" not in model
            ):
                raise NanoVLMError(
                    "model: is not byte-pair encoding (BPE) with merges; use another tokenizer"
                )
            check_settings(
                "model", model, type=None, vocab=None, merges=None, dropout=(None, 0), ignore_merges=(True, False),
                continuing_subword_prefix=(None, ""), end_of_word_suffix=(None, ""),
                # With all 256 bytes in the vocabulary nothing is unknown, and these have no effect.
                unk_token=None, fuse_unk=None, byte_fallback=None,
            )  # fmt: skip
            added_tokens = [
                AddedToken.from_json(spec) for spec in document.pop("added_tokens", None) or []
            ]
            check_settings(
                "tokenizer", document, version=None, truncation=(None,), padding=(None,), normalizer=None,
                pre_tokenizer=None, decoder=None, post_processor=None,  # it acts only with add_special_tokens=True
            )  # fmt: skip
            decoder = document.get("decoder")
            if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
                raise NanoVLMError(
                    f"decoder: {decoder!r:.80} is not implemented; use a tokenizer with ByteLevel, or put the "
                    "tokenizer.model that this was made from beside it"
                )
            merges = (
                pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]
            )
            return cls(
                model.get("vocab"),
                merges,
                added_tokens,
                document,
                model.get("ignore_merges", False),
            )

    @classmethod
    def from_vocab_merges(
        cls,
        vocab_path: str | Path,
        merges_path: str | Path,
        added_tokens: Iterable[AddedToken] | dict[str, int] = (),
        pattern: str = QWEN_PATTERN,
        use_nfc: bool = True,
    ) -> "BytePairTokenizer":
        """Read GPT-2's two files. They name neither special tokens nor a pattern, which is taken to be Qwen's."""
        lines = _read_text(Path(merges_path)).split("\n")
        merges = (
            line.rstrip("\r").split(" ")
            for line in lines
            if line.strip() and not line.startswith("#version")
        )
        vocab = read_json(vocab_path)
        with _naming(Path(merges_path).parent):
            return cls(vocab, merges, _as_added(added_tokens), _pipeline(pattern, use_nfc))

    @classmethod
    def from_tiktoken(
        cls,
        path: str | Path,
        added_tokens: Iterable[AddedToken] | dict[str, int] = (),
        pattern: str = QWEN_PATTERN,
        use_nfc: bool = True,
        special_tokens: Iterable[str] = (),
    ) -> "BytePairTokenizer":
        """Read a tiktoken file: on each line a token's bytes in base64 and its id, which is also its rank.

        It names neither special tokens nor a pattern, which is taken to be Qwen's; `special_tokens` follow its last id. A
        token's merge is the pair that the earlier merges make of its bytes, the only pair that can ever come together to
        form it.
        """
        path = Path(path)
        vocab: dict[str, int] = {}
        for number, line in enumerate(_read_text(path).split("\n"), 1):
            if line.strip():
                try:
                    token, id = line.split()
                    vocab[spell(base64.b64decode(token, validate=True))] = int(id)
                except (ValueError, binascii.Error):
                    raise NanoVLMError(
                        f"{path}:{number}: is not a token in base64 and its id; damaged file?"
                    ) from None
        with _naming(path):
            ranks: dict[tuple[int, int], int] = {}
            merged, merges = [], []
            tokens = {id: token for token, id in vocab.items()}
            for token, id in sorted(vocab.items(), key=lambda item: item[1]):
                if len(token) > 1:
                    pair = merge([vocab[character] for character in token], ranks, merged)
                    if len(pair) == 2:
                        ranks[tuple(pair)] = len(merged)
                        merged.append(id)
                        merges.append((tokens[pair[0]], tokens[pair[1]]))
            following = enumerate(special_tokens, max(vocab.values(), default=-1) + 1)
            added_tokens = [
                *_as_added(added_tokens),
                *(AddedToken(id, content) for id, content in following),
            ]
            return cls(vocab, merges, added_tokens, _pipeline(pattern, use_nfc), ignore_merges=True)

    def _normalize(self, text: str) -> str:
        return nfc(text) if self._nfc else text

    def _find_added(self, text: str, normalized: bool, special: bool) -> Iterator[str | int]:
        """The text with the added tokens of one round replaced by their ids."""
        pattern, tokens = self._rounds[normalized]
        start = 0
        for match in pattern.finditer(text):
            token = tokens[match[0]]
            if special or not token.special:
                yield text[start : match.start()]
                yield token.id
                start = match.end()
        yield text[start:]

    def _encode(self, text: str, special: bool) -> list[int]:
        ids: list[int] = []
        for segment in self._find_added(without_surrogates(text), False, special):
            if isinstance(segment, int):
                ids.append(segment)
                continue
            for piece in self._find_added(self._normalize(segment), True, special):
                if isinstance(piece, int):
                    ids.append(piece)
                    continue
                for word in cut(piece, self._patterns):
                    ids += self._encode_word(word)
        return ids

    def _encode_word(self, word: str) -> list[int]:
        if self._ignore_merges:
            token = spell(word.encode())
            if token in self._vocab and token not in self.special_tokens:
                return [self._vocab[token]]
        return self._encoder.encode(word)

    def encode(self, text: str) -> list[int]:
        return self._encode(text, special=False)

    def encode_with_special(self, text: str) -> list[int]:
        return self._encode(text, special=True)

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = False) -> bytes:
        skipped = self.special_tokens if skip_special else ()
        tokens = (self._tokens.get(id, "") for id in ids)
        return b"".join(unspell(token) for token in tokens if token not in skipped)

    def add_special_token(self, text: str) -> int:
        if text not in self.special_tokens:
            self._add([AddedToken(self.vocab_size, text)])
        return self.special_tokens[text]

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json`, which the `tokenizers` package reads too."""
        flags = {"single_word": False, "lstrip": False, "rstrip": False}
        added_tokens = sorted(self._added.values(), key=lambda token: token.id)
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
            "merges": [
                f"{self._tokens[left]} {self._tokens[right]}" for left, right in self._encoder.pairs
            ],
        }
        document = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "post_processor": None,
            **self._pipeline,
            "added_tokens": [asdict(token) | flags for token in added_tokens],
            "model": model,
        }
        write_atomically(Path(folder) / "tokenizer.json", json.dumps(document, ensure_ascii=False))


def _as_added(tokens: Iterable[AddedToken] | dict[str, int]) -> Iterable[AddedToken]:
    """Added tokens, from themselves or from special tokens' texts and ids."""
    return (
        [AddedToken(id, content) for content, id in tokens.items()]
        if isinstance(tokens, dict)
        else tokens
    )


def _pipeline(pattern: str, use_nfc: bool) -> dict:
    """What a `tokenizer.json` would say outside its model, for files that do not say it."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "normalizer": {"type": "NFC"} if use_nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
    }
