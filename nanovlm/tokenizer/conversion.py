"""A SentencePiece model as a `tokenizer.json`, for tools that read no other tokenizer.

The merges are not in the model: each piece's score says when it is merged, and any two pieces that
spell a third one are a pair that may become it.
"""

from collections.abc import Container
from typing import Any

from sentencepiece import SentencePieceProcessor

from nanovlm.errors import NanoVLMError
from nanovlm.tokenizer.sentence_piece import SPACE, SentencePieceTokenizer, fields

# Field numbers of sentencepiece_model.proto, and the number of a byte-pair model.
TRAINING, NORMALIZATION, MODEL_TYPE, SPACE_AS_SUFFIX = 2, 3, 3, 24
RULES, REMOVES_SPACES, ESCAPES_SPACES, BYTE_PAIRS = 2, 4, 5, 2
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def to_tokenizer_json(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """The content of a `tokenizer.json` that gives the same ids.

    Raises NanoVLMError for a model that is no byte-pair encoding, or changes texts otherwise than
    by writing their spaces as pieces do.
    """
    _check(tokenizer.model)
    model = SentencePieceProcessor(model_proto=tokenizer.model)
    special = sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
    puts_space = tokenizer.puts_space
    write_spaces = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    read_spaces = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    if puts_space:
        write_spaces.insert(0, {"type": "Prepend", "prepend": SPACE})
    decoders = [*read_spaces, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if puts_space:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": text, **_FLAGS, "special": True} for text, id in special
        ],
        "normalizer": {"type": "Sequence", "normalizers": write_spaces},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.id_to_piece(model.unk_id()),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {model.id_to_piece(id): id for id in range(len(model))},
            "merges": _merges(model, tokenizer.special_tokens),
        },
    }


def _check(model: bytes) -> None:
    values = {
        (part, field): model[first:last]
        for part, start, end in fields(model, 0, len(model))
        if part in (TRAINING, NORMALIZATION)
        for field, first, last in fields(model, start, end)
    }
    problem = None
    # Of a number, the bytes; one that is left out has the default.
    if values.get((TRAINING, MODEL_TYPE), b"\1") != bytes([BYTE_PAIRS]):
        problem = "is no byte-pair encoding (model_type bpe)"
    elif values.get((NORMALIZATION, RULES)):
        problem = "normalizes texts before it encodes them"
    elif values.get((NORMALIZATION, REMOVES_SPACES), b"\1") != b"\0":
        problem = "removes extra spaces"
    elif values.get((NORMALIZATION, ESCAPES_SPACES), b"\1") != b"\1":
        problem = "encodes spaces as they are"
    elif values.get((TRAINING, SPACE_AS_SUFFIX), b"\0") != b"\0":
        problem = "puts the space of a word behind it"
    if problem:
        raise NanoVLMError(
            f"its SentencePiece model {problem}, which is not written as a tokenizer.json; models "
            "like LLaMA's are: byte pairs, with the identity as normalization"
        )


def _merges(model: SentencePieceProcessor, special: Container[str]) -> list[str]:
    """Pairs of pieces in the order in which they are merged: the highest score first."""
    pieces = {
        piece: id
        for id in range(len(model))
        if (piece := model.id_to_piece(id)) not in special and not model.is_byte(id)
    }
    pairs = [
        (-model.get_score(id), pieces[left], pieces[right], f"{left} {right}")
        for piece, id in pieces.items()
        for left, right in ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        if left in pieces and right in pieces
    ]
    return [pair[-1] for pair in sorted(pairs)]
