"""Answers to records, and the controls that take the image away."""

import pytest
import torch

from nanovlm.data.records import read_records
from nanovlm.errors import NanoVLMError
from nanovlm.evaluation import answers
from nanovlm.evaluation.__main__ import score
from nanovlm.evaluation.answers import answer_records, other_images, references_of
from nanovlm.hub.models import load_model


@pytest.fixture(scope="module")
def model(tiny):
    return load_model(tiny.model)


@pytest.fixture(scope="module")
def records(tiny):
    return read_records(tiny.data / "val.jsonl")[0]


@pytest.fixture
def seen(monkeypatch):
    """Every batch that a model is asked with."""
    batches, generate = [], answers.generate
    monkeypatch.setattr(
        answers,
        "generate",
        lambda model, batch, *rest: batches.append(batch) or generate(model, batch, *rest),
    )
    return batches


def test_one_answer_a_record_in_order_whatever_the_batches(model, records):
    alone = list(answer_records(model, records[:7], max_new_tokens=5, batch_size=1))
    assert (
        list(answer_records(model, records[:7], max_new_tokens=5, batch_size=3)) == alone
        and len(alone) == 7
    )


def test_the_answer_itself_is_not_in_the_prompt(model, records, seen):
    list(answer_records(model, records[:1], max_new_tokens=1))
    ids = seen[0].input_ids[0].tolist()
    assert ids[-1] == model.tokenizer.special_tokens["<assistant>"]
    assert references_of(records[0])[0] not in model.tokenizer.decode(ids)


def test_blind_is_the_mean_colour_and_shuffled_is_the_image_of_another_record(model, records, seen):
    for control in ("none", "blind", "shuffled"):
        list(
            answer_records(
                model, records, max_new_tokens=1, batch_size=len(records), control=control
            )
        )
    plain, blind, shuffled = (batch.pixels for batch in seen)
    assert plain.abs().max() > 0 and not blind.any()
    assert all(torch.equal(first.input_ids, seen[0].input_ids) for first in seen)
    assert not any(torch.equal(one, other) for one, other in zip(plain, shuffled, strict=True))
    assert {tuple(image.flatten().tolist()) for image in plain} == {
        tuple(image.flatten().tolist()) for image in shuffled
    }
    with pytest.raises(NanoVLMError, match="control 'mirrored' is not known"):
        next(answer_records(model, records, control="mirrored"))


def test_every_image_is_swapped_once(records):
    others = other_images(records)
    assert (
        set(others)
        == set(others.values())
        == {path for record in records for path in record.images}
    )
    assert all(image != other for image, other in others.items()) and others == other_images(
        records
    )
    with pytest.raises(NanoVLMError, match="two images or more"):
        other_images(records[:1])


def test_score_counts_a_description_in_any_order_and_reports_each_kind(records, capsys):
    right = [references_of(record)[0] for record in records]
    result = score(records, right)
    assert (
        result["exact"] == 1
        and result["bleu_4"] == pytest.approx(1, abs=1e-3)
        and result["n"] == len(records)
    )
    lines = capsys.readouterr().err
    assert all(kind in lines for kind in {record.extra["kind"] for record in records})
    wrong = score(records, ["？"] * len(records))
    assert wrong["exact"] == 0 and wrong["cider_d"] == 0
    assert (
        wrong.keys() == result.keys() == {"exact", "cider_d", "bleu_4", "chair_i", "chair_s", "n"}
    )
    # An answer that names nothing names nothing wrong.
    assert result["chair_i"] == wrong["chair_i"] == 0
    questions = [record for record in records if record.extra["kind"] == "count"]
    assert "chair_i" not in score(questions, [references_of(record)[0] for record in questions])
