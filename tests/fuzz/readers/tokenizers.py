"""Tokenizer files of every sort, and the chat templates beside them."""

import base64
import struct
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from nanovlm.hub.chat_configs import read_chat_config
from nanovlm.hub.toy import ASSETS
from nanovlm.tokenizer import load_tokenizer
from nanovlm.tokenizer.merges import BYTE_TO_CHARACTER
from nanovlm.tokenizer.pretokenize import QWEN_PATTERN
from tests.fuzz.damage import (
    TEXTS,
    damaged_bytes,
    damaged_file,
    damaged_json,
    damaged_text,
    to_json,
)
from tests.fuzz.inputs import Content, FaultError, Input, Kind

ENCODED = (
    "图中有什么？\nA red circle, 12 of them.",
    " " * 300 + "a" * 300 + "!",
    "<|im_start|></s>",
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>")
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PATTERNS = (
    QWEN_PATTERN, "a{99999999999}", "(" * 3000 + ")" * 3000, "(a+)+$", "(a*)*b", "[", "(?<=a+)b",
    "(?P<a>", r"\p{Han}", "[[:alpha:]]", "a{,9}{,9}{,9}{,9}", "(?:a|a|a|a)*!", "", "\\", "(?i)a",
)  # fmt: skip
MERGES = [["a", "b"], ["ab", "c"], ["Ġ", "a"], ["i", "n"], ["in", "g"]]


@cache
def _vocab() -> dict[str, int]:
    tokens = [*BYTE_TO_CHARACTER.values(), *(left + right for left, right in MERGES)]
    return {token: id for id, token in enumerate(tokens)}


def _document(pattern: str = QWEN_PATTERN) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    level["use_regex"] = False
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    split["invert"] = False
    added = [
        {"id": len(_vocab()) + number, "content": text, "special": True, **flags}
        for number, text in enumerate(SPECIAL)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": _vocab(), "merges": MERGES, "ignore_merges": False},
    }


def _config(template: str = CHATML, **more: Any) -> dict[str, Any]:
    added = {
        str(len(_vocab()) + number): {"content": text, "special": True}
        for number, text in enumerate(SPECIAL)
    }
    return {"added_tokens_decoder": added, "chat_template": template, **more}


def make(rng: Random) -> Input:
    """The files of one sort of tokenizer, of which one is damaged."""
    return rng.choice((_tokenizer_json, _vocab_and_merges, _tiktoken, _sentence_piece))(rng)


def _tokenizer_json(rng: Random) -> Input:
    files: dict[str, Content] = {"tokenizer_config.json": to_json(_config())}
    what = rng.randrange(5)
    if what == 0:
        files["tokenizer.json"] = to_json(_document(rng.choice(PATTERNS)))
    elif what == 1:
        document = _document()
        files["tokenizer.json"] = to_json(document)
        files["tokenizer_config.json"] = damaged_json(rng, _config())
    elif what == 2:
        files["tokenizer.json"] = to_json(_document())
        template = damaged_text(rng, CHATML).encode(errors="replace")
        files["chat_template.jinja"] = rng.choice((template, damaged_bytes(rng, template)))
    elif what == 3:  # its small part, which the many tokens would hide
        document = _document()
        rest = {key: value for key, value in document.items() if key != "model"}
        content = damaged_json(rng, {**rest, "model": 0})
        if isinstance(content, bytes):
            content = content.replace(b'"model": 0', b'"model": ' + to_json(document["model"]))
        files["tokenizer.json"] = content
    else:
        files["tokenizer.json"] = damaged_json(rng, _document())
    return Input(files)


def _vocab_and_merges(rng: Random) -> Input:
    merges = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in MERGES)
    files: dict[str, Content] = {
        "vocab.json": to_json(_vocab()),
        "merges.txt": merges.encode(),
        "tokenizer_config.json": to_json(_config(tokenizer_class="Qwen2Tokenizer")),
    }
    spoiled = rng.choice(list(files))
    if spoiled == "merges.txt":
        text = merges.encode()
        files[spoiled] = damaged_file(
            rng, text, lambda: damaged_text(rng, merges).encode("utf-8", "replace")
        )
    elif spoiled == "vocab.json":
        files[spoiled] = damaged_json(rng, _vocab())
    else:
        files[spoiled] = damaged_json(rng, _config(tokenizer_class=rng.choice(TEXTS)))
    return Input(files)


def _tiktoken(rng: Random) -> Input:
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    lines += [
        f"{base64.b64encode(text).decode()} {256 + i}" for i, text in enumerate((b"ab", b"abc"))
    ]
    text = "\n".join(lines) + "\n"
    place = rng.randrange(len(lines))
    lines[place] = damaged_text(rng, lines[place])
    damaged = "\n".join(lines).encode("utf-8", "replace")
    config = damaged_json(rng, {"tokenizer_class": "QWenTokenizer"})
    return Input({
        "qwen.tiktoken": damaged_file(rng, text.encode(), lambda: damaged),
        "tokenizer_config.json": rng.choice((b'{"tokenizer_class": "QWenTokenizer"}', config)),
    })  # fmt: skip


def _sentence_piece(rng: Random) -> Input:
    model = (ASSETS / "tiny-language-model" / "tokenizer.model").read_bytes()
    files: dict[str, Content] = {"tokenizer.model": model}
    what = rng.randrange(4)
    if what == 0:
        files["added_tokens.json"] = damaged_json(rng, {"<image>": 640, "<pad>": 641})
    elif what == 1:
        config = _config("", bos_token="<s>", eos_token={"content": "</s>"}, pad_token="<pad>")
        config["added_tokens_decoder"] = {"640": {"content": "<pad>", "special": True}}
        files["tokenizer_config.json"] = damaged_json(rng, config)
        files["special_tokens_map.json"] = damaged_json(rng, {"bos_token": "<s>"})
    else:
        files["tokenizer.model"] = damaged_file(rng, model, lambda: _damaged_pieces(rng, model))
    return Input(files)


def _damaged_pieces(rng: Random, model: bytes) -> bytes:
    """A SentencePiece model with another field in, or in place of, one of its messages."""
    starts = [place for place in range(len(model) - 2) if model[place] == 0x0A][:2000]
    place = rng.choice(starts)
    length = model[place + 1]
    text = str(rng.choice(TEXTS)).encode("utf-8", "replace")[:100]
    piece = (
        b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", rng.choice((-1, 1e38)))
    )
    piece += b"\x18" + bytes([rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 127))])
    message = b"\x0a" + bytes([len(piece)]) + piece
    return model[:place] + rng.choice((message, b"")) + model[place + rng.choice((0, 2 + length)) :]


def read(_: Input) -> None:
    """Load the tokenizer, encode and decode texts; they never give a special token."""
    tokenizer = load_tokenizer(Path())
    unknown = tokenizer.special_tokens.get("<unk>")
    special = set(tokenizer.special_tokens.values()) - {unknown}
    for text in ENCODED:
        ids = tokenizer.encode(text)
        if special & set(ids):
            raise FaultError("a text gives a special token")
        tokenizer.decode(ids)
        tokenizer.decode(tokenizer.encode_with_special(text), skip_special=True)
    read_chat_config(Path(), tokenizer)


KIND = Kind("tokenizers", make, read, short=40, long=1200)
