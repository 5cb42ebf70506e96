"""Tokens of an answer grouped into words, with the shipped tokenizer, which falls back to bytes."""

import pytest

from nanovlm.explain.words import answer_words
from nanovlm.hub.models import load_model
from nanovlm.model.vlm import VisionLanguageModel
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return load_model(REPOSITORY / "nanovlm/assets/tiny-vlm")


def words_of(model: VisionLanguageModel, text: str) -> list[str]:
    return [word.text for word in answer_words(model, model.tokenizer.encode(text))]


def test_english_is_cut_at_spaces_and_marks(model):
    text = "There are three well-known objects: a big red ring, 12 stars, it's café."
    expected = "There are three well-known objects a big red ring 12 stars it's café"
    assert words_of(model, text) == expected.split()


def test_chinese_stays_as_the_tokenizer_cuts_it(model):
    assert words_of(model, "大的红色圆环、小的橙色三角形。") == [
        *("大", "的", "红色", "圆环", "小", "的", "橙色", "三角形")
    ]


def test_bytes_of_one_character_are_one_word(model):
    tokens = model.tokenizer.encode("鹅")
    assert len(tokens) > 1  # not in the vocabulary
    assert [word.text for word in answer_words(model, tokens)] == ["鹅"]
    assert answer_words(model, tokens)[0].tokens == tuple(range(len(tokens)))
    assert answer_words(model, tokens[:-1]) == []  # cut off within the character


def test_each_word_names_its_tokens_and_special_tokens_are_none(model):
    tokens = [*model.tokenizer.encode("three，红色"), model.chat.end_of_turn_id]
    words = answer_words(model, tokens)
    assert [word.text for word in words] == ["three", "红色"]
    for word in words:
        assert model.tokenizer.decode([tokens[i] for i in word.tokens]).strip() == word.text
    assert answer_words(model, model.tokenizer.encode("。，!")) == []
