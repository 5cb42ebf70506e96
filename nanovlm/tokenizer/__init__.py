"""Text to ids and back: one interface over byte-pair vocabularies (Qwen's files) and SentencePiece models.

`encode` is for what a user typed and never gives the id of a special token, however the text is spelled. Only the
program places those, by `special_tokens[…]` or `encode_with_special`.
"""

from pathlib import Path

from nanovlm.errors import NanoVLMError
from nanovlm.tokenizer.base import Tokenizer
from nanovlm.tokenizer.byte_pair import AddedToken, BytePairTokenizer
from nanovlm.tokenizer.pretokenize import GPT2_PATTERN
from nanovlm.tokenizer.sentence_piece import MODEL_FILE, SentencePieceTokenizer
from nanovlm.utils.files import read_json

__all__ = [
    "AddedToken",
    "BytePairTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "load_tokenizer",
]


# The first Qwen's special tokens stand in its published code, not in a file; they follow the vocabulary.
QWEN1_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{i}|>" for i in range(205)),
)
NAMED_SPECIAL = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


def _read_added(folder: Path) -> tuple[list[AddedToken], dict]:
    """The added tokens that `tokenizer_config.json` tells of, and all it says."""
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    try:
        return [
            AddedToken.from_json({"id": int(id), **spec})
            for id, spec in config.get("added_tokens_decoder", {}).items()
        ], config
    except (AttributeError, TypeError, ValueError):
        raise NanoVLMError(
            f"{path}: added_tokens_decoder is not an object of ids and tokens; damaged file?"
        ) from None
    except NanoVLMError as error:
        raise NanoVLMError(f"{path}: {error}") from None


def _read_cutting(folder: Path) -> tuple[list[AddedToken], str, dict]:
    """The added tokens, the tokenizer's kind and the way to cut words, for byte-pair files that do not say."""
    added_tokens, config = _read_added(folder)
    name = str(config.get("tokenizer_class", "Qwen2Tokenizer")).removesuffix("Fast")
    if name == "GPT2Tokenizer":
        return added_tokens, name, {"pattern": GPT2_PATTERN, "use_nfc": False}
    if name not in ("Qwen2Tokenizer", "QWenTokenizer"):
        path = folder / "tokenizer_config.json"
        raise NanoVLMError(f"{path}: how {name} cuts words is not known; save it as tokenizer.json")
    return added_tokens, name, {}


def _read_sentence_piece(path: Path) -> SentencePieceTokenizer:
    """A SentencePiece model with what the files beside it add: tokens with an id, and special tokens that are only named,
    which get the next free ones, as the reference gives them."""
    added_tokens, config = _read_added(path.parent)
    for token in added_tokens:
        if not token.special:
            raise NanoVLMError(
                f"{path.parent / 'tokenizer_config.json'}: added token {token.content!r} is not special, which "
                "is not implemented for SentencePiece; use a tokenizer without it"
            )
    tokenizer = SentencePieceTokenizer.from_file(
        path, {token.content: token.id for token in added_tokens}
    )
    for text in _named_special(path.parent, config):
        try:
            tokenizer.add_special_token(text)
        except NanoVLMError as error:
            raise NanoVLMError(f"{path}: {error}") from None
    return tokenizer


def _named_special(folder: Path, config: dict) -> list[str]:
    """The special tokens that `special_tokens_map.json` and `tokenizer_config.json` give a part to, without an id."""
    path = folder / "special_tokens_map.json"
    tokens = []
    for source in (read_json(path) if path.exists() else {}, config):
        more = source.get("additional_special_tokens")
        tokens += [*map(source.get, NAMED_SPECIAL), *(more if isinstance(more, list) else [])]
    texts = (token.get("content") if isinstance(token, dict) else token for token in tokens)
    return [text for text in texts if isinstance(text, str)]


def _is_converted(folder: Path) -> bool:
    """Whether `tokenizer.json` is only a conversion of the SentencePiece model beside it, as LLaMA's is."""
    if not (folder / MODEL_FILE).exists():
        return False
    model = read_json(folder / "tokenizer.json").get("model")
    return isinstance(model, dict) and (
        model.get("byte_fallback") is True or model.get("type") == "Unigram"
    )


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read the tokenizer of a model folder.

    Looked for in this order: `tokenizer.json`; `vocab.json` with `merges.txt`; one `*.tiktoken`; `tokenizer.model` or
    one other `*.model` (SentencePiece), which also goes before a `tokenizer.json` that was made from it. For all but the
    first, `tokenizer_config.json` gives the added tokens.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").exists() and not _is_converted(folder):
        return BytePairTokenizer.from_tokenizer_json(folder / "tokenizer.json")
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        added_tokens, _, cutting = _read_cutting(folder)
        vocab, merges = folder / "vocab.json", folder / "merges.txt"
        return BytePairTokenizer.from_vocab_merges(vocab, merges, added_tokens, **cutting)
    for suffix, preferred in ((".tiktoken", ""), (".model", MODEL_FILE)):
        found = sorted(folder.glob(f"*{suffix}"))
        if folder / preferred in found:
            found = [folder / preferred]
        if len(found) > 1:
            raise NanoVLMError(
                f"{folder}: holds {len(found)} {suffix} files ({found[0].name}, …); leave one"
            )
        if found and suffix == ".model":
            return _read_sentence_piece(found[0])
        if found:
            added_tokens, name, cutting = _read_cutting(folder)
            following = QWEN1_SPECIAL_TOKENS if name == "QWenTokenizer" and not added_tokens else ()
            return BytePairTokenizer.from_tiktoken(
                found[0], added_tokens, special_tokens=following, **cutting
            )
    raise NanoVLMError(
        f"{folder}: holds no tokenizer; expected tokenizer.json, vocab.json + merges.txt, *.tiktoken or *.model"
    )
