"""Damage: to the values of a JSON document, to its text, to any bytes.

Every function takes a random generator first, so that a seed decides all.
"""

import copy
import gzip
import json
import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from tests.fuzz.inputs import Content, Special

NUMBERS = (
    0, 1, -1, 2, 3, 7, 64, 255, 1000, 2**15, 2**31 - 1, 2**31, 2**53 + 1, 2**62, 2**63, 2**64,
    10**30, -(2**63), 0.5, 16.5, -0.0, 1e-320, 1e-45, 1e-8, 1e30, 1e308, math.inf, -math.inf,
    math.nan,
)  # fmt: skip
TEXTS = (
    "", " ", "a", "1", "true", "null", "\0", "a\0b", "\n", "a\nerror: forged", "\r", "\x1b[2J",
    "\x7f", "\x9b2J", "\u202e", "\u2028", "\ufeff", "\ud800", "\udcff", "é", "图", "😀", ".", "..",
    "../a", "~", "*", "[a", "a,b", "a/b", "a\\b", "%s%n", "{}", "<image>", "<image><image>",
    "<|im_start|>", "<|im_end|>", "</s>", "<s>", "<video>", "<|image_pad|>", "nan", "inf",
    "x" * 5000, "图" * 3000,
)  # fmt: skip
# A value that `to_json` writes as lists within lists, and one of more digits than an int may have.
DEEP, DIGITS = "@deep@", "@digits@"
FOREIGN = {
    "empty": b"",
    "git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\n"
    b"size 123456\n",
    "html": b"<!DOCTYPE html>\n<html><head><title>404</title></head><body></body></html>\n",
    "gzip": gzip.compress(b'{"a": 1}\n', mtime=0),
    "zip": b"PK\x03\x04" + bytes(26),
    "parquet": b"PAR1\x15\x04\x15\x10\xff\xfe" + bytes(20) + b"PAR1",
    "gguf": b"GGUF\x03\0\0\0" + bytes(24),
    "pickle": b"\x80\x02}q\x00.",
    "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40),
    "avif": b"\0\0\0\x20ftypavif\0\0\0\0avifmif1" + bytes(40),
    "png": b"\x89PNG\r\n\x1a\n" + bytes(20),
    "yaml": b"a: 1\nb:\n  - 2\n",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "zeros": bytes(4096),
    "utf-16": "{}".encode("utf-16"),
}


def to_json(value: Any) -> bytes:
    """JSON text, in which NaN, infinity and lone surrogates are possible."""
    text = json.dumps(value)
    deep = "[" * 30_000 + "]" * 30_000
    return text.replace(f'"{DEEP}"', deep).replace(f'"{DIGITS}"', "9" * 5000).encode()


def any_value(rng: Random) -> Any:
    """A value that may surprise: a number at a limit, a text, nothing, a list, an object."""
    if rng.random() < 0.05:
        return rng.choice((DEEP, DIGITS))
    value = rng.choice((rng.choice(NUMBERS), rng.choice(TEXTS), None, True, False, [], {}))
    return rng.choice((value, value, value, [value], [value] * 3, {"a": value}, {"type": value}))


def _like(rng: Random, value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        near = (value + 1, value - 1, value * 2, -value, value / 3, round(value, 1), float(value))
        whole = [number for number in NUMBERS if isinstance(number, int)]
        return rng.choice((rng.choice(near), rng.choice(near), rng.choice(whole)))
    if isinstance(value, str):
        return rng.choice((rng.choice(TEXTS), damaged_text(rng, value)))
    if isinstance(value, list):
        return rng.choice((value[::-1], value[1:], value * 2, value[:-1]))
    return value if value is None else dict(reversed(value.items()))


def damaged_value(rng: Random, value: Any) -> Any:
    """A copy of a JSON value with one to three changes anywhere in it."""
    value = {"": copy.deepcopy(value)}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change(rng, value)
    return value.get("")


def _change(rng: Random, root: dict[str, Any]) -> None:
    if not (places := list(_places(root))):
        return
    container, key = rng.choice(places)
    value, what = container[key], rng.randrange(14)
    if what == 0:
        del container[key]
    elif what == 1 and isinstance(container, dict) and container is not root:
        near = f"{key}x"
        container[rng.choice((near, str(rng.choice(TEXTS)), str(key).upper()))] = container.pop(key)
    elif what == 2:
        other, name = rng.choice(places)
        # A copy, since a value inside of itself would have no end.
        container[key] = copy.deepcopy(other.get(name) if isinstance(other, dict) else None)
    elif what == 3 and isinstance(container, dict) and container is not root:
        container[str(rng.choice(TEXTS))] = any_value(rng)
    elif what == 4 and isinstance(container, list):
        container.insert(rng.randrange(len(container) + 1), any_value(rng))
    elif what == 5:
        container[key] = any_value(rng)
    elif what == 6:
        container[key] = str(value)
    else:
        container[key] = _like(rng, value)


def _places(value: Any):
    """Each (container, key) within a value."""
    keys = value if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


def damaged_text(rng: Random, text: str) -> str:
    """A text with something put in, taken out or written twice."""
    start, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    middle = rng.choice(("", rng.choice(TEXTS), text[start:end] * 2))
    return text[:start] + middle + text[end:]


def damaged_bytes(rng: Random, data: bytes, times: Sequence[int] = (1, 1, 2, 4, 16)) -> bytes:
    """Bytes with bits turned over, or parts put in, taken out, written twice or set to zero."""
    for _ in range(rng.choice(times)):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((1, 1, 2, 4, 8, 64, len(data))))
        middle = rng.choice(
            (
                bytes(byte ^ (1 << rng.randrange(8)) for byte in data[start:end]),
                b"",
                rng.randbytes(end - start),
                data[start:end] * 2,
                bytes(end - start),
                b"\xff" * (end - start),
                rng.choice((1, 2**16, 2**31, 2**62)).to_bytes(8, rng.choice(("little", "big"))),
            )
        )
        data = data[:start] + middle + data[end:]
    return data


def rewritten(rng: Random, text: bytes) -> bytes:
    """A text file as an editor, a download or a person would spoil it, or write it otherwise."""
    place = rng.randrange(len(text) + 1)
    return rng.choice(
        (
            b"\xef\xbb\xbf" + text,
            text.decode(errors="replace").encode("utf-16"),
            text[:place],
            text.replace(b"\n", b"\r\n"),
            text.replace(b",", b"", 1),
            text.replace(b'"', b"'"),
            text[:place] + b"\xff" + text[place:],
            text[:place] + b"\0" + text[place:],
            text[:place] + b"// note\n" + text[place:],
            text + text,
            b"\n\n" + text + b"\n\n",
            text[:place] + bytes(len(text) - place),
        )
    )


def damaged_file(rng: Random, data: bytes, structured: Callable[[], bytes]) -> Content:
    """A file whose content `structured` has damaged; now and then, damage of another sort."""
    chance = rng.random()
    if chance < 0.85:
        return structured()
    if chance < 0.90:
        return damaged_bytes(rng, data)
    if chance < 0.94:
        return rewritten(rng, data)
    if chance < 0.98:
        return rng.choice(list(FOREIGN.values()))
    return rng.choice(list(Special))


def damaged_json(rng: Random, value: Any) -> Content:
    """The file of a JSON document, damaged."""
    return damaged_file(rng, to_json(value), lambda: to_json(damaged_value(rng, value)))
