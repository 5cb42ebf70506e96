"""Text to ids and back: one interface over byte-pair vocabularies (Qwen's files) and SentencePiece models.

`encode` is for what a user typed and never gives the id of a special token, however the text is spelled. Only the
program places those, by `special_tokens[…]` or `encode_with_special`.
"""

from pathlib import Path

from nanovlm.errors import NanoVLMError
from nanovlm.files import read_json
from nanovlm.tokenizer.base import Tokenizer
from nanovlm.tokenizer.byte_pair import AddedToken, BytePairTokenizer
from nanovlm.tokenizer.pretokenize import GPT2_PATTERN
from nanovlm.tokenizer.sentence_piece import MODEL_FILE, SentencePieceTokenizer

__all__ = ["AddedToken", "BytePairTokenizer", "SentencePieceTokenizer", "Tokenizer", "load_tokenizer"]


def _read_config(folder: Path) -> tuple[list[AddedToken], dict]:
    """The added tokens, and the way to cut words, that `tokenizer_config.json` tells of files that do not say."""
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    try:
        added_tokens = [
            AddedToken.from_json({"id": int(id), **spec}) for id, spec in config.get("added_tokens_decoder", {}).items()
        ]
    except (AttributeError, TypeError, ValueError):
        raise NanoVLMError(f"{path}: added_tokens_decoder is not an object of ids and tokens; damaged file?") from None
    except NanoVLMError as error:
        raise NanoVLMError(f"{path}: {error}") from None
    name = str(config.get("tokenizer_class", "Qwen2Tokenizer")).removesuffix("Fast")
    if name == "GPT2Tokenizer":
        return added_tokens, {"pattern": GPT2_PATTERN, "use_nfc": False}
    if name not in ("Qwen2Tokenizer", "QWenTokenizer"):
        raise NanoVLMError(f"{path}: how {name} cuts words is not known; save it as tokenizer.json")
    return added_tokens, {}


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read the tokenizer of a model folder.

    Looked for in this order: `tokenizer.json`; `vocab.json` with `merges.txt`; one `*.tiktoken`; `tokenizer.model` or
    one other `*.model` (SentencePiece). For the second and third, `tokenizer_config.json` gives the added tokens.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").exists():
        return BytePairTokenizer.from_tokenizer_json(folder / "tokenizer.json")
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        added_tokens, cutting = _read_config(folder)
        vocab, merges = folder / "vocab.json", folder / "merges.txt"
        return BytePairTokenizer.from_vocab_merges(vocab, merges, added_tokens, **cutting)
    for suffix, preferred in ((".tiktoken", ""), (".model", MODEL_FILE)):
        found = sorted(folder.glob(f"*{suffix}"))
        if folder / preferred in found:
            found = [folder / preferred]
        if len(found) > 1:
            raise NanoVLMError(f"{folder}: holds {len(found)} {suffix} files ({found[0].name}, …); leave one")
        if found and suffix == ".model":
            return SentencePieceTokenizer.from_file(found[0])
        if found:
            added_tokens, cutting = _read_config(folder)
            return BytePairTokenizer.from_tiktoken(found[0], added_tokens, **cutting)
    raise NanoVLMError(
        f"{folder}: holds no tokenizer; expected tokenizer.json, vocab.json + merges.txt, *.tiktoken or *.model"
    )
