"""The words of captions: one record per image, counts, the vocabulary, and the batches of both."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from nanovlm.data.batches import Batches, BatchOptions, RecordEncoder
from nanovlm.data.records import Record
from nanovlm.data.words import Vocabulary, WordBatch, by_image, count_words, word_encoder
from nanovlm.errors import NanoVLMError
from nanovlm.hub.models import load_model
from nanovlm.inputs.chat import Message


def record(name: str, images: str, *answers: str, labelled: bool = True) -> Record:
    turns = [
        turn
        for answer in answers
        for turn in (Message.parse("user", "?"), Message.parse("assistant", answer, labelled))
    ]
    return Record(name, tuple(map(Path, images.split())), tuple(turns), (), {})


class Letters:
    """A tokenizer with a token for each character."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def counts_of(*answers: str) -> dict[str, int]:
    counts = count_words(record("r", "a.jpg", *answers), Letters())
    return {chr(token): count for token, count in counts.items()}


def test_the_records_of_an_image_become_one_and_those_without_have_no_part():
    records = [
        record("1", "a.jpg", "x"),
        record("2", "", "no image"),
        record("3", "a.jpg b.jpg", "y"),
        record("4", "a.jpg", "z", "w"),
    ]
    merged = by_image(records)
    assert [(each.where, len(each.messages)) for each in merged] == [("1", 6), ("3", 2)]
    assert [turn.text for turn in merged[0].messages[1::2]] == ["x", "z", "w"]


def test_captions_are_counted_and_not_occurrences():
    assert counts_of("aab", "ac", "d") == {"a": 2, "b": 1, "c": 1, "d": 1}


def test_questions_and_answers_that_are_not_to_be_learned_give_no_word():
    assert not count_words(record("r", "a.jpg", "abc", labelled=False), Letters())
    assert "?" not in counts_of("a")


def test_words_are_those_of_enough_images_and_the_most_frequent_ones():
    seen = ({1: 5, 2: 1, 9: 5}, {1: 2, 2: 1}, {1: 5, 2: 2, 5: 5}, {5: 4}, {1: 1}, {})
    images = [Counter(counts) for counts in seen]
    vocabulary = Vocabulary.of(images, in_images=2, at_most=10)
    assert list(vocabulary.tokens) == [1, 2, 5]  # 9 is in one image alone
    # One more image has every word, and one has none.
    assert vocabulary.frequency == pytest.approx([5 / 8, 4 / 8, 3 / 8])
    assert list(Vocabulary.of(images, in_images=2, at_most=2).tokens) == [1, 2]


def test_no_frequency_is_0_or_1():
    vocabulary = Vocabulary.of([Counter({1: 1})] * 5, in_images=1, at_most=1)
    assert 0 < vocabulary.frequency[0] < 1


@pytest.fixture(scope="module")
def model(tiny):
    return load_model(tiny.model)


def test_a_batch_holds_visual_tokens_and_the_words_of_its_images(tiny, model):
    images = sorted((tiny.data / "images").rglob("*.*"))[:3]
    answers = {0: ("红色", "红色"), 1: ("蓝色", "红色"), 2: ("蓝色",)}
    records = [
        record(f"r{number}", " ".join(map(str, images[: number + 1])), *texts)
        for number, texts in answers.items()
    ]
    encoder = word_encoder(RecordEncoder.of(model), records, [], in_images=1, at_most=100)
    options = BatchOptions(batch_size=3, max_length=1, shuffle=False)  # the images are not cut
    batch = Batches(records, encoder, options)[0].batch
    assert isinstance(batch, WordBatch)
    length = model.image_length
    assert batch.lengths == (length, 2 * length, 3 * length)  # of one, two and three images
    assert len(batch.image_positions) == 6 * length and not len(batch.targets)
    expected = torch.zeros(3, len(encoder.vocabulary))
    place = {token: number for number, token in enumerate(encoder.vocabulary.tokens)}
    for row, texts in zip(expected, answers.values()):
        for text in texts:
            for token in set(model.tokenizer.encode(text)):
                row[place[token]] += 1
    torch.testing.assert_close(batch.counts, expected)
    assert {0.0, 1.0, 2.0} == set(expected.flatten().tolist())


def test_held_out_captions_add_no_words(tiny, model):
    images = sorted((tiny.data / "images").rglob("*.*"))[:2]
    learned, held_out = (
        [record(name, str(image), text)]
        for name, image, text in zip("ab", images, ("红色", "蓝色正方形"))
    )
    encoder = word_encoder(RecordEncoder.of(model), learned, held_out, in_images=1, at_most=100)
    assert set(encoder.vocabulary.tokens) == set(model.tokenizer.encode("红色"))
    options = BatchOptions(batch_size=1, max_length=9, shuffle=False)
    known = set(model.tokenizer.encode("蓝色正方形")) & set(encoder.vocabulary.tokens)
    batch = Batches(held_out, encoder, options)[0].batch
    assert isinstance(batch, WordBatch)
    assert int((batch.counts > 0).sum()) == len(known)


def test_without_any_word_it_says_what_to_do(model):
    records = [record("a", "a.jpg", "红色")]
    with pytest.raises(NanoVLMError, match="5 of the 1 images; lower --word-images"):
        word_encoder(RecordEncoder.of(model), records, [], in_images=5, at_most=100)
