"""Reading byte-pair tokenizers from the files that Qwen and its relatives are published with."""

import base64
import binascii
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanovlm.errors import NanoVLMError, quoted
from nanovlm.tokenizer.byte_pair import AddedToken, BytePairTokenizer
from nanovlm.tokenizer.merges import bytes_to_token, merge
from nanovlm.tokenizer.pretokenize import QWEN_PATTERN, check_settings
from nanovlm.utils.files import read_json, read_text
from nanovlm.utils.sniff import refuse_stand_in


def read_tokenizer_json(path: Path) -> BytePairTokenizer:
    """Read the single file of the `tokenizers` package; unimplemented settings are refused."""
    document = read_json(path)
    with _naming(path):
        model = document.pop("model", None)
        _check_model(model)
        added_tokens = [read_added_token(spec) for spec in document.pop("added_tokens", None) or []]
        _check_document(document)
        return BytePairTokenizer(
            model.get("vocab"),
            (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]),
            added_tokens,
            document,
            model.get("ignore_merges", False),
        )


def read_vocab_merges(
    vocab_path: Path,
    merges_path: Path,
    added_tokens: Iterable[AddedToken],
    pattern: str = QWEN_PATTERN,
    use_nfc: bool = True,
) -> BytePairTokenizer:
    """Read GPT-2's two files, which name no special tokens and no pre-tokenization."""
    merges = (
        line.rstrip("\r").split(" ")
        for line in refuse_stand_in(merges_path, read_text(merges_path)).split("\n")
        if line.strip() and not line.startswith("#version")
    )
    vocab = read_json(vocab_path)
    with _naming(merges_path.parent):
        return BytePairTokenizer(vocab, merges, added_tokens, _pipeline(pattern, use_nfc))


def read_tiktoken(
    path: Path,
    added_tokens: Iterable[AddedToken],
    special_tokens: Sequence[str] = (),
    pattern: str = QWEN_PATTERN,
    use_nfc: bool = True,
) -> BytePairTokenizer:
    """Read a tiktoken file: on each line a token's bytes in base64 and its id.

    It names no special tokens and no pre-tokenization. `special_tokens` get the ids that follow.
    """
    vocab: dict[str, int] = {}
    for number, line in enumerate(refuse_stand_in(path, read_text(path)).split("\n"), 1):
        if line.strip():
            try:
                token, id = line.split()
                vocab[bytes_to_token(base64.b64decode(token, validate=True))] = int(id)
            except (ValueError, binascii.Error):
                raise NanoVLMError(
                    f"{path}:{number}: is not a token in base64 and its id; damaged file?"
                ) from None
    with _naming(path):
        merges = _merges_of(vocab)
        following = enumerate(special_tokens, max(vocab.values(), default=-1) + 1)
        added_tokens = [*added_tokens, *(AddedToken(id, content) for id, content in following)]
        pipeline = _pipeline(pattern, use_nfc)
        return BytePairTokenizer(vocab, merges, added_tokens, pipeline, ignore_merges=True)


def _merges_of(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The merges of a vocabulary whose ids are in the order of learning.

    A token's merge is the pair that the earlier merges make of its bytes, because no other pair
    can ever meet to form it.
    """
    tokens = {id: token for token, id in vocab.items()}
    ranks: dict[tuple[int, int], int] = {}
    merged: list[int] = []
    merges: list[tuple[str, str]] = []
    for token, id in sorted(vocab.items(), key=lambda item: item[1]):
        if len(token) > 1:
            pair = merge([vocab[character] for character in token], ranks, merged)
            if len(pair) == 2:
                left, right = pair
                ranks[left, right] = len(merged)
                merged.append(id)
                merges.append((tokens[left], tokens[right]))
    return merges


def read_added_token(spec: Any) -> AddedToken:
    """Read an entry of `added_tokens`."""
    is_object = isinstance(spec, dict)
    if not is_object or type(spec.get("id")) is not int or not isinstance(spec.get("content"), str):
        raise NanoVLMError(f"added token {quoted(spec)} has no id or content; damaged file?")
    check_settings(
        f"added token {quoted(spec['content'])}", spec, id=None, content=None,
        special=(True, False), normalized=(True, False), single_word=(False,), lstrip=(False,),
        rstrip=(False,),
    )  # fmt: skip
    special = spec.get("special", False)
    return AddedToken(spec["id"], spec["content"], special, spec.get("normalized", not special))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name before an error in its settings or in the layout of its JSON."""
    try:
        yield
    except NanoVLMError as error:
        raise NanoVLMError(f"{path}: {error}") from None
    except (AttributeError, KeyError, TypeError) as error:
        raise NanoVLMError(
            f"{path}: is not laid out as such a file should be ({error}); damaged file?"
        ) from None


def _check_model(model: Any) -> None:
    """Refuse the `model` of a `tokenizer.json` that is not plain byte-pair encoding."""
    is_object = isinstance(model, dict)
    if not is_object or model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise NanoVLMError(
            "model: is not byte-pair encoding (BPE) with merges; use another tokenizer"
        )
    check_settings(
        "model", model, type=None, vocab=None, merges=None, dropout=(None, 0),
        ignore_merges=(True, False), continuing_subword_prefix=(None, ""),
        end_of_word_suffix=(None, ""),
        # With all 256 bytes in the vocabulary nothing is unknown, and these have no effect.
        unk_token=None, fuse_unk=None, byte_fallback=None,
    )  # fmt: skip


def _check_document(document: dict) -> None:
    """Refuse unimplemented settings of a `tokenizer.json` outside its model."""
    check_settings(
        "tokenizer", document, version=None, normalizer=None, pre_tokenizer=None, decoder=None,
        # These act where the `tokenizers` package is asked to cut, to pad, or to add tokens.
        truncation=None, padding=None, post_processor=None,
    )  # fmt: skip
    decoder = document.get("decoder")
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        raise NanoVLMError(
            f"decoder: {quoted(decoder)} is not implemented; use a tokenizer with ByteLevel, or "
            "put the tokenizer.model that this was made from beside it"
        )


def _pipeline(pattern: str, use_nfc: bool) -> dict:
    """The part of a `tokenizer.json` outside its model, for files without one."""
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    return {
        "normalizer": {"type": "NFC"} if use_nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
    }
