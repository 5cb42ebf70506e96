"""Answers to records, and the controls that take the image away."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from nanovlm.data.records import read_records
from nanovlm.errors import NanoVLMError
from nanovlm.evaluation import __main__ as evaluation
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


def test_a_record_that_cannot_be_answered_is_named_and_the_others_are(
    model, records, tmp_path, capsys, monkeypatch
):
    (tmp_path / "cut.png").write_bytes(records[0].images[0].read_bytes()[:60])
    broken = dataclasses.replace(records[1], images=(tmp_path / "cut.png",))
    asked = [records[0], broken, *records[2:5]]
    alone = list(answer_records(model, records[:5], max_new_tokens=4))
    for batch_size in (1, 2, 5):
        given = list(answer_records(model, asked, max_new_tokens=4, batch_size=batch_size))
        assert given == [alone[0], None, *alone[2:]]
        said = capsys.readouterr().err
        assert said.startswith(f"skipped: {broken.where}: ") and said.count("\n") == 1
    monkeypatch.setattr(answers, "MAX_NAMED", 2)
    with pytest.raises(NanoVLMError, match="cut.png"):  # nothing works, so it is not the records
        list(answer_records(model, [broken] * 5, max_new_tokens=4, batch_size=2))


def test_the_command_scores_what_could_be_answered_and_keeps_every_file(
    tiny, records, tmp_path, call
):
    lines = [json.loads(line) for line in (tiny.data / "val.jsonl").read_text().splitlines()[:3]]
    for line in lines:
        line["image"] = str(tiny.data / line["image"])
    (tmp_path / "cut.png").write_bytes(Path(lines[1]["image"]).read_bytes()[:60])
    lines[1]["image"] = str(tmp_path / "cut.png")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ("--model", tiny.model, "--data", data, "--max-new-tokens", "2", "--device", "cpu")
    done = call(evaluation.main, *flags, "--answers", tmp_path / "answers.jsonl")
    assert done.returncode == 0 and json.loads(done.stdout)["n"] == 2
    assert "skipped: 1 of 3 records, which do not count" in done.stderr
    wrote = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["where"] for line in wrote] == [f"{data}:1", f"{data}:3"]
    for out, expected in (
        (data, "is read by this command"),
        (tmp_path / "answers.jsonl", "is there already and stays as it is"),
        (tmp_path / "cut.png", "is there already"),
        (tiny.model / "answers.jsonl", "lies in a folder that this command reads"),
    ):
        before = out.read_bytes() if out.exists() else None
        refused = call(evaluation.main, *flags, "--answers", out)
        assert refused.returncode == 2 and expected in refused.stderr
        assert refused.stderr.count("\n") == 1
        assert (out.read_bytes() if out.exists() else None) == before
