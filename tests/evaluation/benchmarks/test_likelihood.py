"""Log-probabilities of choices: those of reading every choice in full, from one pass."""

import dataclasses

import pytest
import torch

from nanovlm.data.collate import prepare
from nanovlm.data.records import read_records
from nanovlm.errors import NanoVLMError
from nanovlm.evaluation.answers import prompt_of
from nanovlm.evaluation.benchmarks.likelihood import rank_choices
from nanovlm.hub.models import load_model
from nanovlm.inputs.chat import IGNORED, Message
from nanovlm.inputs.image import open_image

# Of one token each, of several, and of different lengths.
CHOICES = [("A", "B", "C"), ("Yes", "No"), ("红色的圆形。", "没有。", "图", "two")]


@pytest.fixture(scope="module")
def model(tiny):
    return load_model(tiny.model)


@pytest.fixture(scope="module")
def records(tiny):
    """Questions with choices, the first two about one image."""
    found = read_records(tiny.data / "val.jsonl")[0][:6]
    found[1] = dataclasses.replace(found[1], images=found[0].images)
    return [
        dataclasses.replace(record, extra={"choices": CHOICES[number % 3]})
        for number, record in enumerate(found)
    ]


def read_in_full(model, record, choice: str, pixels=lambda pixels: pixels) -> float:
    """The log-probability of an answer's tokens but the last, the end of the turn."""
    conversation = (*prompt_of(record), Message("assistant", (choice,)))
    batch = prepare(model, [conversation], [[open_image(path) for path in record.images]])
    batch.pixels = pixels(batch.pixels)
    labels = model.chat.encode(conversation, [model.image_tokens(64, 64)]).labels
    with torch.no_grad():
        hidden_states = model.language_model.hidden_states(model.embed(batch))
        logits = model.language_model.logits(hidden_states)[0].float().log_softmax(-1)
    places = [n for n, label in enumerate(labels) if label != IGNORED][:-1]
    return float(sum(logits[n - 1, labels[n]] for n in places))


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_each_choice_is_as_likely_as_when_it_is_read_in_full(model, records, batch_size):
    lengths = {len(model.chat.answer_ids(text)) for choices in CHOICES for text in choices}
    assert 1 in lengths and max(lengths) > 3
    for record, scores in zip(records, rank_choices(model, records, batch_size), strict=True):
        expected = [read_in_full(model, record, choice) for choice in record.extra["choices"]]
        assert scores == pytest.approx(expected, abs=1e-4)


def test_the_controls_take_the_image_away_and_change_nothing_else(model, records):
    blind = list(rank_choices(model, records, control="blind"))
    for record, scores in zip(records, blind):
        expected = [
            read_in_full(model, record, choice, torch.zeros_like)
            for choice in record.extra["choices"]
        ]
        assert scores == pytest.approx(expected, abs=1e-4)
    seen, shuffled = (list(rank_choices(model, records, control=name)) for name in
                      ("none", "shuffled"))  # fmt: skip
    assert all(len(one) == len(other) for one, other in zip(seen, shuffled))
    assert all(one != other for one, other in zip(seen, shuffled))


def test_an_image_is_encoded_once_for_all_questions_of_a_batch(model, records, monkeypatch):
    encoded, features = [], model.vision_features
    monkeypatch.setattr(
        model, "vision_features", lambda pixels: encoded.append(len(pixels)) or features(pixels)
    )
    read, hidden_states = [], model.language_model.hidden_states
    monkeypatch.setattr(
        model.language_model,
        "hidden_states",
        lambda inputs, *rest, **more: (
            read.append(inputs.shape[1]) or hidden_states(inputs, *rest, **more)
        ),
    )
    letters = [
        dataclasses.replace(record, extra={"choices": ("A", "B", "C", "D")}) for record in records
    ]
    list(rank_choices(model, letters))
    images = {path for record in records for path in record.images}
    assert encoded == [len(images)] and len(images) < len(records)
    assert len(read) == 1  # one pass, where all choices have one token


def test_what_cannot_be_asked_is_named_and_gives_none(model, records, tmp_path, capsys):
    (tmp_path / "cut.png").write_bytes(records[0].images[0].read_bytes()[:60])
    broken = dataclasses.replace(records[1], images=(tmp_path / "cut.png",))
    long = dataclasses.replace(records[2], messages=(Message("user", ("很长" * 600,)),), images=())
    asked = [records[0], broken, long, records[3]]
    scores = list(rank_choices(model, asked))
    assert [each is None for each in scores] == [False, True, True, False]
    said = capsys.readouterr().err
    assert f"skipped: {broken.where}: " in said and "more than the language model's 1024" in said
    with pytest.raises(NanoVLMError, match="two images or more"):
        list(rank_choices(model, records[:1], control="shuffled"))
