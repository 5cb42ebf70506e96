r"""Pre-tokenization: normalizing a text and splitting it into words before byte-pair encoding.

Equal to the `tokenizers` package, on the standard library. A `tokenizer.json` gives its patterns in
the Oniguruma dialect, whose `\p{L}` (letter), `\p{N}` (number) and `\p{M}` (mark) Python's `re`
lacks. Their members come from `unicodedata`; the tables below add those that an older Python does
not know, so that every Python up to Unicode 16 gives the same words. Unimplemented settings are
refused.
"""

import math
import re
import sys
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from nanovlm.errors import NanoVLMError, quoted

# The patterns of Qwen2 to Qwen3 and of GPT-2 (`ByteLevel` with `use_regex`), for files without one.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Oniguruma's classes follow Unicode 16, Python 3.11's Unicode 14. These code points are new since.
NEW_IN_UNICODE_15_AND_16 = {
    "L": "1c89-1c8a a7cb-a7cd a7da-a7dc 105c0-105f3 10d4a-10d65 10d6f-10d85 10ec2-10ec4 "
    "1123f-11240 11380-11389 1138b 1138e 11390-113b5 113b7 113d1 113d3 11bc0-11be0 11f02 "
    "11f04-11f10 11f12-11f33 1342f 13441-13446 13460-143fa 16100-1611d 16d40-16d6c 18cff "
    "1b132 1b155 1df25-1df2a 1e030-1e06d 1e4d0-1e4eb 1e5d0-1e5ed 1e5f0 2b739 2ebf0-2ee5d "
    "31350-323af",
    "M": "897 cf3 ece 10d69-10d6d 10efc-10eff 11241 113b8-113c0 113c2 113c5 113c7-113ca "
    "113cc-113d0 113d2 113e1-113e2 11f00-11f01 11f03 11f34-11f3a 11f3e-11f42 11f5a 13440 "
    "13447-13455 1611e-1612f 1e08f 1e4ec-1e4ef 1e5ee-1e5ef",
    "N": "10d40-10d49 116d0-116e3 11bf0-11bf9 11f50-11f59 16130-16139 16d70-16d79 1ccf0-1ccf9 "
    "1d2c0-1d2d3 1e4f0-1e4f9 1e5f1-1e5fa",
}
# The NFC of `tokenizers` follows Unicode 9: it neither reorders nor composes later combining marks.
NEW_MARKS_SINCE_UNICODE_9 = (
    "7fd 898-89f 8ca-8d3 9fe c3c d3b-d3c eba 1715 1abf-1ace 1df6-1dfa a82c 10d24-10d27 "
    "10eab-10eac 10f46-10f50 10f82-10f85 11070 1133b 1145e 11839-1183a 11930 1193d-1193e "
    "11943 119e0 11a34 11a47 11a99 11d42 11d44-11d45 11d97 16ff0-16ff1 1e130-1e136 1e2ae "
    "1e2ec-1e2ef"
)
# Limits of a pattern: characters, groups within each other, and ways in which an alternative can
# match one text. Published patterns have 2,000, 1 and 16.
MAX_PATTERN, MAX_DEPTH, MAX_WAYS = 10_000, 8, 128
MAX_SPLITS = 32  # steps of pre-tokenization; published tokenizers have up to 5
_QUANTIFIER = re.compile(r"(?:[*+?]|\{(\d{0,4}(?:,\d{0,4})?)\})[?+]?")
_PATTERN_TOKEN = re.compile(
    r"\\[pP]\{[^}]*\}|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\((?:\?(?:<?[=!]|>|[a-z]*:))?"
    rf"|{_QUANTIFIER.pattern}|.",
    re.DOTALL,
)
# Unicode's white space; Python's `\s` adds 1c to 1f.
WHITE_SPACE = "9-d 20 85 a0 1680 2000-200a 2028-2029 202f 205f 3000"


def _ranges(table: str) -> list[tuple[int, int]]:
    """First and last code point of each range of a table."""
    items = (item.partition("-") for item in table.split())
    return [(int(first, 16), int(last or first, 16)) for first, _, last in items]


def _set(ranges: list[tuple[int, int]]) -> str:
    """The ranges as the inside of a `[…]` of `re`."""
    return "".join(rf"\U{first:08x}-\U{last:08x}" for first, last in ranges)


@lru_cache(maxsize=1)
def _character_classes() -> dict[str, str]:
    r"""The insides of `[…]` that stand for `\p{L}`, `\p{M}`, `\p{N}` and `\s`."""
    categories = "".join(map(unicodedata.category, map(chr, range(sys.maxunicode + 1))))
    major = bytearray(categories[::2], "ascii")  # "Lu" counts as "L"
    for letter, table in NEW_IN_UNICODE_15_AND_16.items():
        for first, last in _ranges(table):
            major[first : last + 1] = letter.encode() * (last + 1 - first)
    classes = {r"\s": _set(_ranges(WHITE_SPACE))}
    for letter in "LMN":
        runs = re.finditer(letter.encode() + b"+", major)
        classes[rf"\p{{{letter}}}"] = _set([(run.start(), run.end() - 1) for run in runs])
    return classes


@lru_cache(maxsize=1)
def _normalization_patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Patterns of the text that NFC may change, and of long runs of combining marks in it."""
    inert = " ".join(
        [NEW_MARKS_SINCE_UNICODE_9, NEW_IN_UNICODE_15_AND_16["L"], NEW_IN_UNICODE_15_AND_16["M"]]
    )
    touched = re.compile(f"[^{_set(_ranges(inert))}]+")
    # Planes 2 and above have no combining marks.
    marks = (chr(code) for code in range(0x20000) if unicodedata.combining(chr(code)))
    return touched, re.compile(f"[{''.join(filter(touched.match, marks))}]{{32,}}")


def nfc(text: str) -> str:
    """Canonical composition (Unicode NFC) as `tokenizers` computes it, alike on every Python."""
    if unicodedata.is_normalized("NFC", text):
        return text
    touched, mark_runs = _normalization_patterns()
    # Python sorts marks by insertion, in quadratic time, but linear for runs in order already.
    text = mark_runs.sub(lambda run: "".join(sorted(run[0], key=unicodedata.combining)), text)
    return touched.sub(lambda part: unicodedata.normalize("NFC", part[0]), text)


def translate_pattern(pattern: str) -> re.Pattern[str]:
    r"""Compile an Oniguruma pattern with `re`.

    Implemented are `\p{L}`, `\p{M}`, `\p{N}`, `\s`, `\S` and what both dialects share, as far as no
    text can make the pattern run away (`_refuse_runaway`), as all published patterns are.
    """
    if len(pattern) > MAX_PATTERN:
        raise NanoVLMError(f"pattern {quoted(pattern)} is longer than {MAX_PATTERN} characters")
    classes, translated, in_set = _character_classes(), [], False
    tokens = re.findall(r"\\[pP]\{[^}]*\}|\\.|&&|\}\+|.", pattern, re.DOTALL)
    for token in tokens:
        if token in classes:
            token = classes[token] if in_set else f"[{classes[token]}]"
        elif token == r"\S" and not in_set:
            token = "[^" + classes[r"\s"] + "]"
        elif token[0] == "\\" and token[1:].isalnum() and token not in (r"\r", r"\n", r"\t"):
            raise _unimplemented(f"pattern {quoted(pattern)}: {token}")
        elif token in ("[", "&&") if in_set else token in ("^", "$", "}+"):
            raise _unimplemented(f"pattern {quoted(pattern)}: {token!r} here")
        elif token in "[]":
            in_set = token == "["
        translated.append(token)
    _refuse_runaway(pattern)
    try:
        return re.compile("".join(translated))
    except (re.error, OverflowError, RecursionError) as error:
        raise NanoVLMError(
            f"pattern {quoted(pattern)} is not a regular expression `re` can read: {error}"
        ) from None


class _Item(NamedTuple):
    """A part of an alternative: a character, a set of them or a group, and its repetitions."""

    text: str
    least: int
    most: int | None  # None: without an end
    ways: int = 1  # in which what is repeated can match one text

    @property
    def can_fail(self) -> bool:
        """Whether the alternative fails where this is not found."""
        return self.least > 0

    @property
    def all_ways(self) -> int:
        """The ways of all numbers of repetitions; one without an end is for `_refuse_runaway`."""
        return self.ways * (1 if self.most is None else self.most - self.least + 1)


def _refuse_runaway(pattern: str) -> None:
    """Refuse a pattern whose search may take more than about linear time."""

    def refuse(problem: str) -> NanoVLMError:
        return NanoVLMError(
            f"pattern {quoted(pattern)}: {problem}, so that some texts could take for ever; "
            "use a tokenizer without it"
        )

    alternatives = _alternatives(pattern, refuse)
    for index, items in enumerate(alternatives):
        if math.prod(item.all_ways for item in items) > MAX_WAYS:
            raise refuse("it can match in too many ways")
        endless = [i for i, item in enumerate(items) if item.most is None]
        followed = [i for i in endless if any(item.can_fail for item in items[i + 1 :])]
        if len(followed) > 1:
            raise refuse("more has to follow after two repetitions without an end")
        if followed and not _takes(items[followed[0]].text, alternatives[index + 1 :]):
            raise refuse("more has to follow after a repetition without an end")


def _takes(repeated: str, alternatives: list[list[_Item]]) -> bool:
    r"""Whether one of `alternatives` takes what an earlier one has read of `repeated`, and failed.

    It does in published patterns, such as `\s+` after `\s*[\r\n]+`, so that nothing is read
    again from the next character on.
    """
    for items in alternatives:
        needed = [item for item in items if item.can_fail]
        endless = [item.text for item in items if item.most is None]
        if len(needed) == 1 and (needed[0].text, needed[0].most) == (repeated, None):
            return True
        if endless[:1] != [repeated]:
            return False
    return False


def _alternatives(pattern: str, refuse: Callable[[str], NanoVLMError]) -> list[list[_Item]]:
    """The alternatives of a pattern as lists of items; within groups nothing may be endless."""
    tokens = [match[0] for match in _PATTERN_TOKEN.finditer(pattern)]
    groups: list[list[list[_Item]]] = [[[]]]  # the open ones, each with its alternatives
    for token, following in pairwise([*tokens, ""]):
        times = _QUANTIFIER.fullmatch(following)
        if token[0] == "(":
            groups.append([[]])
            if len(groups) > MAX_DEPTH:
                raise refuse("its groups are too deep")
        elif token == "|":
            groups[-1].append([])
        elif token == ")" and len(groups) > 1:
            inner = groups.pop()
            if any(item.most is None for items in inner for item in items):
                raise refuse("a group holds a repetition without an end")
            if times and times[0][0] != "?":
                raise refuse("a group is repeated")
            ways = sum(math.prod(item.all_ways for item in items) for items in inner)
            groups[-1][-1].append(_Item("(…)", *_bounds(times), ways))
        elif not _QUANTIFIER.fullmatch(token):
            groups[-1][-1].append(_Item(token, *_bounds(times)))
    return groups[0]


def _bounds(times: re.Match[str] | None) -> tuple[int, int | None]:
    """The least and the most repetitions that a quantifier allows, None for no end."""
    if times is None:
        return 1, 1
    if times[0][0] in "*+?":
        return {"*": (0, None), "+": (1, None), "?": (0, 1)}[times[0][0]]
    least, comma, most = times[1].partition(",")
    return int(least or 0), int(most) if most else None if comma else int(least or 0)


def check_settings(where: str, spec: dict, **implemented: tuple | None) -> None:
    """Refuse a value that is not among the `implemented` ones of its key; None allows any."""
    for key, value in spec.items():
        allowed = implemented.get(key, ())
        if allowed is not None and value not in allowed:
            raise _unimplemented(f"{where}: {key} = {quoted(value)}")


def _unimplemented(setting: str) -> NanoVLMError:
    return NanoVLMError(f"{setting} is not implemented; use a tokenizer without it")


def _steps(spec: dict | None, children: str) -> list[dict]:
    """A `tokenizer.json` object that may be null or a `Sequence`, as a flat list."""
    if spec is None:
        return []
    if not isinstance(spec, dict) or not isinstance(spec.get("type"), str):
        raise NanoVLMError(f"{children}: expected an object with a type, found {quoted(spec)}")
    if spec["type"] != "Sequence":
        return [spec]
    return [step for child in spec.get(children, []) for step in _steps(child, children)]


def read_normalizer(normalizer: dict | None) -> bool:
    """Whether the normalizer of a `tokenizer.json` is NFC or none; any other is refused."""
    steps = _steps(normalizer, "normalizers")
    for step in steps:
        if step["type"] != "NFC":
            raise NanoVLMError(
                f"normalizer {step['type']:.80} is not implemented; "
                "use a tokenizer with NFC or none"
            )
    return bool(steps)


def read_pre_tokenizer(pre_tokenizer: dict | None) -> list[re.Pattern[str]]:
    """The patterns by which the pre-tokenizer of a `tokenizer.json` splits, in order.

    Implemented are isolating `Split`s and `Digits`, followed by one `ByteLevel`.
    """
    patterns = []
    *splits, last = _steps(pre_tokenizer, "pretokenizers") or [{"type": "null"}]
    if last["type"] != "ByteLevel":
        raise NanoVLMError(
            f"pre-tokenizer: ends with {last['type']:.80}; "
            "only byte-level ones (ByteLevel) are read"
        )
    if len(splits) > MAX_SPLITS:
        raise NanoVLMError(f"pre-tokenizer: has {len(splits)} steps; the limit is {MAX_SPLITS}")
    for step in splits:
        if step["type"] == "Split" and isinstance(step.get("pattern"), dict):
            behaviour = {"behavior": ("Isolated",), "invert": (False,)}
            check_settings("Split", step, type=None, pattern=None, **behaviour)
            regex, literal = step["pattern"].get("Regex"), step["pattern"].get("String")
            if regex is None and not literal:
                raise NanoVLMError(f"Split: pattern {quoted(step['pattern'])} has no text")
            patterns.append(
                re.compile(re.escape(literal)) if regex is None else translate_pattern(regex)
            )
        elif step["type"] == "Digits":
            check_settings("Digits", step, type=None, individual_digits=(True, False))
            number = r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
            patterns.append(translate_pattern(number))
        else:
            raise _unimplemented(f"pre-tokenizer {step['type']:.80}")
    check_settings(
        "ByteLevel", last, type=None, add_prefix_space=(False,), trim_offsets=None,
        use_regex=(True, False),
    )  # fmt: skip
    if last.get("use_regex", True):
        patterns.append(translate_pattern(GPT2_PATTERN))
    return patterns


def pre_tokenize(text: str, patterns: list[re.Pattern[str]]) -> list[str]:
    """The words of a text: each pattern splits them further, into its matches and the rest."""
    words = [text]
    for pattern in patterns:
        pieces = []
        for word in words:
            end = 0
            for match in pattern.finditer(word):
                if match.start() > end:
                    pieces.append(word[end : match.start()])
                pieces.append(match[0])
                end = match.end()
            if end < len(word):
                pieces.append(word[end:])
        words = pieces
    return words
