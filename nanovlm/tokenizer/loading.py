"""Choosing the tokenizer of a model folder, and the added tokens that stand beside it."""

from pathlib import Path

from nanovlm.errors import NanoVLMError
from nanovlm.tokenizer.base import Tokenizer
from nanovlm.tokenizer.byte_pair import AddedToken
from nanovlm.tokenizer.byte_pair_files import (
    read_added_token,
    read_tiktoken,
    read_tokenizer_json,
    read_vocab_merges,
)
from nanovlm.tokenizer.pretokenize import GPT2_PATTERN
from nanovlm.tokenizer.sentence_piece import MODEL_FILE, SentencePieceTokenizer
from nanovlm.utils.files import read_json

# The first Qwen's special tokens follow its vocabulary. Its code lists them, not a file.
QWEN1_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{i}|>" for i in range(205)),
)
NAMED_SPECIAL_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read the tokenizer of a model folder.

    Looked for in this order: `tokenizer.json`; `vocab.json` with `merges.txt`; one `*.tiktoken`;
    `tokenizer.model` or one other `*.model` (SentencePiece), which is also preferred to a
    `tokenizer.json` that was converted from it. For all but the first, `tokenizer_config.json`
    gives the added tokens.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").exists() and not _is_converted(folder):
        return read_tokenizer_json(folder / "tokenizer.json")
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        added_tokens, _, pre_tokenization = _read_byte_pair_config(folder)
        vocab, merges = folder / "vocab.json", folder / "merges.txt"
        return read_vocab_merges(vocab, merges, added_tokens, **pre_tokenization)
    if path := _only_file(folder, "*.tiktoken"):
        added_tokens, name, pre_tokenization = _read_byte_pair_config(folder)
        following = QWEN1_SPECIAL_TOKENS if name == "QWenTokenizer" and not added_tokens else ()
        return read_tiktoken(path, added_tokens, following, **pre_tokenization)
    if path := _only_file(folder, "*.model", preferred=MODEL_FILE):
        return _read_sentence_piece(path)
    raise NanoVLMError(
        f"{folder}: holds no tokenizer; expected tokenizer.json, vocab.json + merges.txt, "
        "*.tiktoken or *.model"
    )


def _is_converted(folder: Path) -> bool:
    """Whether `tokenizer.json` was converted from the SentencePiece model beside it (LLaMA)."""
    if not (folder / MODEL_FILE).exists():
        return False
    model = read_json(folder / "tokenizer.json").get("model")
    return isinstance(model, dict) and (
        model.get("byte_fallback") is True or model.get("type") == "Unigram"
    )


def _only_file(folder: Path, pattern: str, preferred: str | None = None) -> Path | None:
    """The preferred file or the only one of a pattern; None if there is none."""
    found = sorted(folder.glob(pattern))
    if preferred and folder / preferred in found:
        return folder / preferred
    if len(found) > 1:
        suffix = pattern.removeprefix("*")
        raise NanoVLMError(
            f"{folder}: holds {len(found)} {suffix} files ({found[0].name}, …); leave one"
        )
    return found[0] if found else None


def _read_config(folder: Path) -> tuple[list[AddedToken], dict]:
    """The added tokens that `tokenizer_config.json` lists, and the whole file."""
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    try:
        specs = config.get("added_tokens_decoder", {}).items()
        return [read_added_token({"id": int(id), **spec}) for id, spec in specs], config
    except (AttributeError, TypeError, ValueError):
        raise NanoVLMError(
            f"{path}: added_tokens_decoder is not an object of ids and tokens; damaged file?"
        ) from None
    except NanoVLMError as error:
        raise NanoVLMError(f"{path}: {error}") from None


def _read_byte_pair_config(folder: Path) -> tuple[list[AddedToken], str, dict]:
    """Added tokens, class of tokenizer and pre-tokenization of files that name none of them."""
    added_tokens, config = _read_config(folder)
    name = str(config.get("tokenizer_class", "Qwen2Tokenizer")).removesuffix("Fast")
    if name == "GPT2Tokenizer":
        return added_tokens, name, {"pattern": GPT2_PATTERN, "use_nfc": False}
    if name not in ("Qwen2Tokenizer", "QWenTokenizer"):
        path = folder / "tokenizer_config.json"
        raise NanoVLMError(
            f"{path}: the pre-tokenization of {name} is not known; save it as tokenizer.json"
        )
    return added_tokens, name, {}


def _read_sentence_piece(path: Path) -> SentencePieceTokenizer:
    """A SentencePiece model with the special tokens that the files beside it add.

    Those that are named without an id get the next free ones, as in the reference.
    """
    added_tokens, config = _read_config(path.parent)
    for token in added_tokens:
        if not token.special:
            raise NanoVLMError(
                f"{path.parent / 'tokenizer_config.json'}: added token {token.content!r} is not "
                "special, which is not implemented for SentencePiece; use a tokenizer without it"
            )
    ids = {token.content: token.id for token in added_tokens}
    tokenizer = SentencePieceTokenizer.from_file(path, ids)
    for text in _named_special_tokens(path.parent, config):
        try:
            tokenizer.add_special_token(text)
        except NanoVLMError as error:
            raise NanoVLMError(f"{path}: {error}") from None
    return tokenizer


def _named_special_tokens(folder: Path, config: dict) -> list[str]:
    """The special tokens named in `special_tokens_map.json` and `tokenizer_config.json`."""
    path = folder / "special_tokens_map.json"
    tokens = []
    for source in (read_json(path) if path.exists() else {}, config):
        more = source.get("additional_special_tokens")
        tokens += map(source.get, NAMED_SPECIAL_TOKENS)
        tokens += more if isinstance(more, list) else []
    texts = (token.get("content") if isinstance(token, dict) else token for token in tokens)
    return [text for text in texts if isinstance(text, str)]
