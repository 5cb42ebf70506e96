"""The loss of a saved model: that of training's validation, and of transformers."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nanovlm.data.records import read_records
from nanovlm.evaluation import __main__ as evaluation
from nanovlm.evaluation.loss import Loss, measure_loss, perplexity
from nanovlm.hub.models import load_model
from nanovlm.hub.names import QWEN, invert, translate
from nanovlm.hub.safetensors import save_file
from nanovlm.inputs.chat import IGNORED
from nanovlm.training.monitor.log import read_log


def last(measured) -> Loss:
    *_, (_, loss) = measured
    return loss


def test_it_equals_the_validation_of_the_run_to_the_last_digit(tiny, tmp_path, call):
    """More records than a batch has, several of them with one image."""
    run = tiny.train(tmp_path / "run", val_samples=1000, batch_size=8, max_steps=2)
    logged = read_log(run / "metrics.jsonl")[-1]
    done = call(
        evaluation.main,
        *("--model", run / "model", "--data", tiny.data / "val.jsonl", "--loss"),
        *("--batch-size", "8", "--device", "cpu", "--dtype", "float32"),
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["loss"] == logged["val_loss"]
    assert told["perplexity"] == logged["val_perplexity"] == math.exp(told["loss"])
    assert told["n"] == len((tiny.data / "val.jsonl").read_text().splitlines()) > 8


def test_text_alone_has_the_loss_of_transformers(tiny, tmp_path):
    """The language model's weights and the same labels, in the reference's own loss."""
    entry = {
        "messages": [
            {"role": "user", "content": "你好"},
            {"role": "assistant", "content": "小的绿色圆形。"},
            {"role": "user", "content": "What is it?"},
            {"role": "assistant", "content": "A blue circle."},
        ]
    }
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps(entry) + "\n")
    model = load_model(tiny.model)
    records, _ = read_records(path)
    sample = model.chat.encode(records[0].messages)
    config = json.loads((tiny.language_model / "config.json").read_text())
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    published = translate(invert(QWEN))
    weights = model.language_model.state_dict()
    tensors = {published(name): tensor for name, tensor in weights.items()}
    save_file(tensors, tmp_path / "hub" / "model.safetensors", metadata={"format": "pt"})
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "hub", dtype=torch.float32)
    with torch.no_grad():
        expected = reference(
            input_ids=torch.tensor([sample.input_ids]), labels=torch.tensor([sample.labels])
        ).loss
    loss = last(measure_loss(model, records))
    assert loss.mean == pytest.approx(float(expected), abs=1e-5)
    assert loss.perplexity == pytest.approx(math.exp(float(expected)), rel=1e-4)
    assert loss.tokens == sum(label != IGNORED for label in sample.labels) and loss.records == 1


def test_the_controls_take_the_image_away_and_change_nothing_else(tiny):
    model, (records, _) = load_model(tiny.model), read_records(tiny.data / "val.jsonl")
    measured = {name: [*measure_loss(model, records, name)] for name in ("none", "blind")}
    seen, blind = (last(each) for each in measured.values())
    assert seen.tokens == blind.tokens and seen.records == blind.records == len(records)
    assert seen.mean != blind.mean
    assert not any(loaded.batch.pixels.any() for loaded, _ in measured["blind"])
    shuffled = last(measure_loss(model, records, "shuffled"))
    assert shuffled.tokens == seen.tokens and shuffled.mean not in (seen.mean, blind.mean)


def test_how_many_records_are_computed_at_once_changes_nothing_but_the_rounding(tiny):
    model, (records, _) = load_model(tiny.model), read_records(tiny.data / "val.jsonl")
    whole = last(measure_loss(model, records))
    alone = sum(last(measure_loss(model, [record])).total for record in records)
    assert whole.total == pytest.approx(alone, rel=1e-5)


def test_records_that_cannot_be_used_are_named_and_do_not_count(tiny, tmp_path, call):
    lines = [json.loads(line) for line in (tiny.data / "val.jsonl").read_text().splitlines()[:4]]
    for line in lines:
        line["image"] = str(tiny.data / line["image"])
    (tmp_path / "cut.png").write_bytes(Path(lines[1]["image"]).read_bytes()[:60])
    lines[1]["image"] = str(tmp_path / "cut.png")
    question = lines[2]["messages"][:1]
    lines[2] = {"image": lines[2]["image"], "messages": question, "references": ["x"]}
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ("--model", tiny.model, "--data", data, "--loss", "--device", "cpu")
    done = call(evaluation.main, *flags, "--dtype", "float32")
    assert done.returncode == 0 and json.loads(done.stdout)["n"] == 2
    assert f"skipped: {data}:2: {tmp_path / 'cut.png'}" in done.stderr
    assert "skipped: 1 of 4 records, which have references and no answer" in done.stderr
    short = call(evaluation.main, *flags, "--max-length", "24")
    assert short.returncode == 0 and "cut: " in short.stderr
    assert "computing the loss:" in short.stderr  # and no control is named where there is none
    tokens = [json.loads(each.stdout)["tokens"] for each in (short, done)]
    assert tokens[0] < tokens[1]


def test_what_has_no_answers_or_makes_no_sense_is_refused_in_one_line(tiny, tmp_path, call):
    asked = [json.loads(line) for line in (tiny.data / "val.jsonl").read_text().splitlines()[:2]]
    lines = [{"messages": [{"role": "user", "content": "?"}], "references": ["x"]} for _ in asked]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ("--model", tiny.model, "--data", data, "--loss", "--device", "cpu")
    for more, expected in (
        ((), "no record has an answer"),
        (("--answers", tmp_path / "a.jsonl"), "--loss answers nothing"),
        (("--max-length", "0"), "have to be above 0"),
    ):
        refused = call(evaluation.main, *flags, *more)
        assert refused.returncode == 2 and expected in refused.stderr
        assert refused.stderr.splitlines()[-1].startswith("error: ")


def test_a_perplexity_that_no_float_holds_is_its_largest():
    assert perplexity(0.0) == 1 and perplexity(1e9) == math.exp(700)
