"""Character classes and normalization, compared with `tokenizers` for every code point; patterns
that would run away are refused."""

import random
import time

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers

from nanovlm.errors import NanoVLMError
from nanovlm.tokenizer.pretokenize import (
    GPT2_PATTERN,
    QWEN_PATTERN,
    nfc,
    pre_tokenize,
    translate_pattern,
)


def test_character_classes_equal_those_of_tokenizers_for_every_code_point():
    text = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF)
    for name in (r"\p{L}", r"\p{M}", r"\p{N}", r"\s", r"[^\s\p{L}]"):
        words = pre_tokenizers.Split(Regex(name + "+"), "isolated").pre_tokenize_str(text)
        assert pre_tokenize(text, [translate_pattern(name + "+")]) == [word for word, _ in words], (
            name
        )


def test_normalization_equals_that_of_tokenizers_around_every_code_point():
    reference = normalizers.NFC()
    for code in range(0x110000):
        if not 0xD800 <= code <= 0xDFFF:
            text = f"a\u0301{chr(code)}\u0323\u0301"
            assert nfc(text) == reference.normalize_str(text), hex(code)
    rng = random.Random(10)
    for length in range(1, 300):  # long runs of marks
        text = "".join(
            rng.choices(
                "a\u0301\u0323\u0334\u0345\u0344\u07fd", [1, 30, 30, 30, 30, 5, 1], k=length
            )
        )
        assert nfc(text) == reference.normalize_str(text), ascii(text)


# As published, where they differ from those that the module has.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_4O = (  # with one class for its capital and small letters
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]*[\p{L}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+[\p{L}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|\s+"
)
PUBLISHED = (
    QWEN_PATTERN,
    GPT2_PATTERN,
    LLAMA3,
    GPT_4O,
    r"[\r\n]",
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺ]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"[一-龥ࠀ-一가-퟿]+",
    r"\p{N}+",
)


@pytest.mark.parametrize("pattern", PUBLISHED)
def test_published_patterns_are_read(pattern):
    assert translate_pattern(pattern).search("a 1\n一")


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a+)+b",
        "(a|a)*b",
        "(a|aa)+b",
        "(?:a*)*b",
        "(.*a){20}b",
        "a*a*b",
        "a*b",
        "a*b|a|a+",
        "(a*)",
        r"\s*[\r\n]+",
        "a+(?=a+b)",
        "(?:a?){30}b",
        "a?" * 30 + "a" * 30,
        "(a|a)" * 30 + "b",
        "a{0,900}a{0,900}",
        "a{99999999999}",
        "(" * 3000 + "a" + ")" * 3000,
        "(?P<x>a*)(?P=x)b",
        "[a-" + "b" * 20_000,
        "[",
        "(",
        "a)",
        "*",
        "\\",
        r"\1",
    ],
    ids=lambda pattern: pattern[:20],
)
def test_patterns_that_may_run_away_or_cannot_be_read_are_refused(pattern):
    with pytest.raises(NanoVLMError, match="pattern") as caught:
        translate_pattern(pattern)
    assert len(str(caught.value)) < 500


def test_patterns_that_are_read_end_soon():
    """The worst texts for what is allowed take time in proportion to their length."""
    for pattern in (*PUBLISHED, "a*b+|a+", "a?a{0,5}[ab]{1,5}", "(?:ab?|a)?a*"):
        compiled = translate_pattern(pattern)
        for text in ("a" * 100_000, " " * 100_000, "ab" * 50_000, " a" * 50_000, "!" * 100_000):
            start = time.perf_counter()
            pre_tokenize(text, [compiled])
            assert time.perf_counter() - start < 3
