"""Character classes and normalization, compared with `tokenizers` for every code point."""

import random

from tokenizers import Regex, normalizers, pre_tokenizers

from nanovlm.tokenizer.pretokenize import nfc, pre_tokenize, translate_pattern


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
