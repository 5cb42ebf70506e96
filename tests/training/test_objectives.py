"""Preference training: the written-out loss, the reference kept on disk, and whole runs."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nanovlm.data.batches import Batches, BatchOptions, RecordEncoder
from nanovlm.data.preferences import PairEncoder, read_pairs
from nanovlm.errors import NanoVLMError
from nanovlm.hub.loading import open_checkpoint
from nanovlm.hub.models import load_model
from nanovlm.inputs.chat import IGNORED, ImageTokens, Message
from nanovlm.report import read_run, summary
from nanovlm.training import loop
from nanovlm.training.building import build_model
from nanovlm.training.objectives import reference
from nanovlm.training.objectives.preferences import DPO
from nanovlm.training.presets import PRESETS, load_settings
from nanovlm.training.run import run_stage
from nanovlm.training.settings import Settings
from nanovlm.utils.config import from_dict
from tests.runs import metrics

EVERYTHING = "projector,language_model,vision_encoder"


@pytest.fixture(scope="module")
def pairs(tiny, tmp_path_factory) -> Path:
    """36 pairs on the scenes: the right answer, and the one of another question."""
    records = [json.loads(line) for line in (tiny.data / "train.jsonl").read_text().splitlines()][
        ::2
    ][:36]
    answers = [record["messages"][1]["content"] for record in records]
    lines = [
        {
            "image": record["image"],
            "messages": record["messages"][:1],
            "chosen": answer,
            "rejected": next(other for other in answers[number:] + answers if other != answer),
        }
        for number, (record, answer) in enumerate(zip(records, answers))
    ]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def settings_of(tiny, pairs):
    return lambda out, **changes: tiny.settings(
        out,
        **{
            "init": str(tiny.model),
            "data": str(pairs),
            "images": str(tiny.data),
            "val": "",
            "val_fraction": 0.2,
            "objective": "dpo",
            "train": "projector,language_model",
            "lr": 1e-4,
            **changes,
        },
    )


@pytest.fixture
def train(settings_of):
    def start(out: Path, **changes) -> Path:
        run_stage(settings_of(out, **changes))
        return out

    return start


def interrupt_at(monkeypatch, step: int) -> None:
    schedule = loop.schedule
    monkeypatch.setattr(
        loop,
        "schedule",
        lambda current, *rest: (
            signal.raise_signal(signal.SIGINT) if current == step else None,
            schedule(current, *rest),
        )[1],
    )


def written_out(log_probabilities, reference, lengths, beta, label_smoothing, sft_weight):
    """Rafailov et al. 2023, equation 7; Mitchell 2023, equation 3."""
    total = 0.0
    for (chosen, rejected), (chosen_then, rejected_then), length in zip(
        log_probabilities, reference, lengths
    ):
        margin = beta * ((chosen - chosen_then) - (rejected - rejected_then))
        right = torch.sigmoid(margin)
        loss = -(1 - label_smoothing) * torch.log(right) - label_smoothing * torch.log(1 - right)
        total = total + loss - sft_weight * chosen / length
    return total


@pytest.mark.parametrize(
    ("beta", "label_smoothing", "sft_weight"), [(0.1, 0, 0), (0.5, 0.2, 0), (0.3, 0.1, 0.7)]
)
def test_loss_and_gradients_equal_the_formula(tiny, pairs, beta, label_smoothing, sft_weight):
    """Compared with the logits of each answer in its own row; the reference is another model."""
    model = load_model(tiny.model).requires_grad_()
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    for parameter in other.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    records = read_pairs(pairs, tiny.data)[0][:5]
    encoder = PairEncoder(RecordEncoder.of(model))
    options = BatchOptions(batch_size=5, max_length=500, share=8, shuffle=False)
    batches = Batches(records, encoder, options)
    chosen_lengths, sums, sums_then = [], [], []
    for number, record in enumerate(records):
        texts = (record.messages[-1].content[0], record.rejected)
        alone = [
            model.chat.encode(
                (*record.messages[:-1], Message("assistant", (text,))),
                [ImageTokens(model.image_length)],
            )
            for text in texts
        ]
        pixels = batches[0].batch.pixels[number][None]
        for language_model, into in ((model, sums), (other, sums_then)):
            into.append([_log_probability(language_model, encoded, pixels) for encoded in alone])
        chosen_lengths.append(sum(label != IGNORED for label in alone[0].labels))
    encoder.reference = {
        record.where: [value.item() for value in then] for record, then in zip(records, sums_then)
    }
    objective = DPO(beta, label_smoothing, sft_weight)
    batch = batches[0].batch
    loss, sums_of_metrics = objective(model, batch)
    expected = written_out(sums, batch.reference, chosen_lengths, beta, label_smoothing, sft_weight)
    assert objective.count_targets(batch) == 5
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    rewards = beta * (torch.stack([torch.stack(pair) for pair in sums]).detach() - batch.reference)
    margins = rewards[:, 0] - rewards[:, 1]
    assert 0 < float((margins > 0).sum()) < 5
    measured = dict(zip(objective.metric_names, sums_of_metrics.tolist()))
    assert measured == pytest.approx(
        {
            "accuracy": float((margins > 0).sum()),
            "margin": float(margins.sum()),
            "chosen_reward": float(rewards[:, 0].sum()),
            "rejected_reward": float(rewards[:, 1].sum()),
        },
        abs=1e-4,
    )
    trainable = list(model.parameters())
    gradients, right = (
        torch.autograd.grad(value, trainable, allow_unused=True) for value in (loss, expected)
    )
    assert sum(gradient is not None for gradient in gradients) > 30
    for gradient, correct in zip(gradients, right):
        if correct is not None:
            torch.testing.assert_close(gradient, correct, atol=2e-5, rtol=1e-4)


def _log_probability(model, encoded, pixels):
    """Of an answer, from the logits of every position."""
    ids, labels = torch.tensor([encoded.input_ids]), torch.tensor(encoded.labels)
    words = model.language_model.embed_tokens(ids).clone()
    words[0, ids[0] == model.chat.image_token_id] = model.projector(model.vision_features(pixels))[
        0
    ]
    logits = model.language_model.logits(model.language_model.hidden_states(words))[0, :-1]
    return -F.cross_entropy(logits, labels[1:], reduction="sum")


def test_at_the_start_margins_are_zero_and_the_loss_is_log_two(train, tmp_path):
    first = metrics(train(tmp_path / "run", max_steps=1, val_every=1))[0]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert all(
        first[name] == pytest.approx(0, abs=1e-5)
        for name in ("margin", "chosen_reward", "rejected_reward")
    )


def test_accuracy_and_margin_rise_and_the_metrics_are_consistent(train, tmp_path, pairs):
    run = train(
        tmp_path / "run", max_steps=50, batch_size=12, lr=1e-3, val=str(pairs), val_samples=99
    )
    first, *_, last = metrics(run)
    assert (
        first["accuracy"] < 0.7
        and last["accuracy"] > 0.9
        and last["margin"] > 0.1
        and last["loss"] < 0.65
    )
    assert last["margin"] == pytest.approx(
        last["chosen_reward"] - last["rejected_reward"], abs=1e-4
    )
    assert (
        last["val_accuracy"] > 0.9
        and last["val_margin"] > 0.1
        and last["val_loss"] < 0.65
        and "val_perplexity" not in last
    )
    table = summary([read_run(run, "run")])
    assert "held-out pairs right" in table and "held-out margin" in table
    answers = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert answers and all(line["reference"] for line in answers)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 6, "accumulate": 2},
        {"batch_size": 3, "accumulate": 4},
        {"batch_size": 12, "pack": 300},
    ],
    ids=str,
)
def test_accumulated_and_packed_batches_equal_one_large_batch(train, tmp_path, changes):
    settings = dict(train=EVERYTHING, max_steps=3, label_smoothing=0.1, sft_weight=0.5, lr=1e-3)
    whole = metrics(train(tmp_path / "whole", batch_size=12, **settings))
    others = metrics(train(tmp_path / "other", **settings, **changes))
    for line, other in zip(whole, others, strict=True):
        names = (
            ["accuracy"] if line["step"] > 1 else []
        )  # at first all margins are 0 but for rounding
        for name in ("loss", "margin", "chosen_reward", "rejected_reward", *names):
            assert other[name] == pytest.approx(line[name], abs=2e-5), name
        assert (
            other["grad_norm"] == pytest.approx(line["grad_norm"], abs=1e-4)
            and other["samples"] == line["samples"]
        )


@pytest.mark.parametrize(
    "changes",
    [{}, {"lora_rank": 2, "lora_dropout": 0.1}, {"cache_features": True, "dtype": "bfloat16"}],
    ids=str,
)
def test_an_interrupted_run_continues_to_the_same_bits_and_computes_no_reference(
    train, tmp_path, monkeypatch, changes
):
    settings = dict(batch_size=7, accumulate=2, max_steps=5, log_every=2, val_every=3, **changes)
    whole = train(tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(SystemExit):
            train(tmp_path / "stopped", **settings)
    kept = (tmp_path / "stopped" / "reference.jsonl").read_bytes()
    monkeypatch.setattr(
        reference, "compute", lambda *_: pytest.fail("computed again, with a model that has moved")
    )
    stopped = train(tmp_path / "stopped", **settings, resume=True)
    assert metrics(stopped) == metrics(whole)
    assert (
        (stopped / "reference.jsonl").read_bytes()
        == kept
        == (whole / "reference.jsonl").read_bytes()
    )
    for name in (
        "model/model.safetensors",
        *(
            f"checkpoints/step_5/{kind}"
            for kind in ("model.safetensors", "optimizer.safetensors", "state.json")
        ),
    ):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_two_processes_draw_the_curve_of_one(train, settings_of, tmp_path, pairs):
    """Also with fsdp, with a process that has no pair, and with pairs that have no image."""
    lines = [json.loads(line) for line in pairs.read_text().splitlines()]
    spoken = [
        {"prompt": "你好", "chosen": line["chosen"], "rejected": line["rejected"]}
        for line in lines[:17]
    ]
    data = tmp_path / "mixed.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in [*lines[:20], *spoken]))
    common = dict(
        data=str(data), max_steps=6, val_every=3, train=EVERYTHING, val_samples=5, lr=1e-3
    )
    runs = [
        asdict(settings_of(tmp_path / kind, batch_size=2, parallel=kind, **common))
        for kind in ("ddp", "fsdp")
    ]
    script = Path(__file__).parent / "distributed" / "torchrun_runs.py"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            str(script),
            json.dumps(runs),
            "{}",
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(script.parents[3]), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    alone = train(tmp_path / "alone", batch_size=4, **common)
    for kind in ("ddp", "fsdp"):
        for line, expected in zip(metrics(tmp_path / kind), metrics(alone), strict=True):
            assert line.keys() == expected.keys()
            for name in ("loss", "margin", "val_loss", "val_margin", "grad_norm", "samples"):
                assert line.get(name) == pytest.approx(expected.get(name), abs=1e-4), (kind, name)
        parts = [
            (folder / "reference.jsonl").read_text().splitlines()[1:]
            for folder in (tmp_path / kind, alone)
        ]
        for ours, right in zip(*(map(json.loads, part) for part in parts), strict=True):
            assert ours == pytest.approx(right, abs=1e-4)


def test_the_reference_on_disk_is_the_starting_models_and_stays_with_lora(train, tmp_path, pairs):
    run = train(tmp_path / "run", max_steps=1, val_samples=99)
    adapted = train(
        tmp_path / "adapted", max_steps=1, val_samples=99, lora_rank=2, lora_dropout=0.5
    )
    kept = (run / "reference.jsonl").read_text()
    made_from, *lines = map(json.loads, kept.splitlines())
    assert (
        made_from["dtype"] == "float32" and len(made_from["data"]) == len(made_from["init"]) == 64
    )
    assert len(lines) == len(pairs.read_text().splitlines()) and all(
        line["chosen"] < 0 > line["rejected"] for line in lines
    )
    assert (adapted / "reference.jsonl").read_text() == kept


def test_a_reference_made_from_something_else_is_an_error_that_names_it(
    train, tiny, pairs, tmp_path, monkeypatch
):
    init, data = tmp_path / "init", tmp_path / "pairs.jsonl"
    shutil.copytree(tiny.model, init)
    shutil.copy(pairs, data)
    settings = dict(init=str(init), data=str(data), max_steps=4)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt_at(patch, 1)
        train(tmp_path / "run", **settings)

    def refusal() -> str:
        with pytest.raises(NanoVLMError) as caught:
            train(tmp_path / "run", **settings, resume=True)
        assert "\n" not in str(caught.value) and "reference.jsonl" in str(caught.value)
        return str(caught.value)

    weights = (init / "model.safetensors").read_bytes()
    (init / "model.safetensors").write_bytes(weights[:-4] + b"\0\0\0\0")
    assert "with another --init than the run has" in refusal()
    (init / "model.safetensors").write_bytes(weights)
    text = data.read_text()
    data.write_text(text + text.splitlines()[0] + "\n")
    settings["max_length"] = 300
    assert "with another --data, --max-length than" in refusal()
    data.write_text(text)
    del settings["max_length"]
    file = tmp_path / "run" / "reference.jsonl"
    kept = file.read_bytes()
    for damaged in (
        b"[]\n",
        b"[" * 9999 + b"\n",
        b"\xff\n",
        b"".join(kept.splitlines(keepends=True)[:-1]),  # cut off after a whole line
        kept.replace(b'"chosen": -', b'"chosen": 1e999, "x": -'),
        kept.replace(b'"rejected": -', b'"rejected": "-1", "x": -'),
    ):
        file.write_bytes(damaged)
        assert "missing or damaged" in refusal()
    file.unlink()
    assert "missing or damaged" in refusal()
    file.write_bytes(kept)
    train(tmp_path / "run", **settings, resume=True)


def test_a_pair_whose_image_cannot_be_read_is_named_and_left_out(
    train, tiny, pairs, tmp_path, capsys
):
    lines = [json.loads(line) for line in pairs.read_text().splitlines()]
    data = tmp_path / "pairs.jsonl"
    (tmp_path / "broken.png").write_bytes(b"no image")
    broken = lines[0] | {"image": str(tmp_path / "broken.png")}
    data.write_text("".join(json.dumps(line) + "\n" for line in lines * 4 + [broken]))
    run = train(
        tmp_path / "run", data=str(data), max_steps=0, epochs=1, batch_size=12, val_fraction=0.0
    )
    assert f"skipped: {data}:{len(lines) * 4 + 1}: " in capsys.readouterr().err
    assert len((run / "reference.jsonl").read_text().splitlines()) == 1 + 4 * len(lines)
    assert metrics(run)[-1]["samples"] >= 4 * len(lines) and metrics(run)[-1]["loss"] > 0


def test_a_loss_that_is_not_finite_changes_nothing(train, tmp_path, monkeypatch):
    call, numbers = DPO.__call__, []

    def broken(self, model, batch):
        loss, sums_of_metrics = call(self, model, batch)
        if model.training and numbers.append(0) is None and len(numbers) == 2:
            return loss * float("nan"), sums_of_metrics * float("nan")
        return loss, sums_of_metrics

    monkeypatch.setattr(DPO, "__call__", broken)
    lines = metrics(train(tmp_path / "run", max_steps=3, log_every=3))
    assert len(json.loads((tmp_path / "run" / "bad_steps.jsonl").read_text())["records"]) == 4
    assert all(lines[-1][name] == lines[-1][name] for name in DPO.metric_names)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"objective": "ppo"}, "take one of sft, dpo"),
        ({"beta": 0.0}, "--beta is 0.0"),
        ({"label_smoothing": 0.5}, "below 0.5"),
        ({"sft_weight": -1.0}, "--sft-weight is -1.0"),
        ({"objective": "dpo", "init": ""}, "give --init"),
    ],
)
def test_what_is_refused(changes, expected):
    with pytest.raises(NanoVLMError, match=expected):
        build_model(Settings(**{"init": "model", **changes}))


def test_the_tiny_preset_has_a_table_for_it():
    settings = from_dict(Settings, tomllib.loads((PRESETS / "tiny.toml").read_text())["dpo"])
    assert (
        settings.objective == "dpo" and settings.init == load_settings("stage2", []).out + "/model"
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint.keys()}


def test_only_what_is_named_is_trained(train, tiny, tmp_path):
    run = train(tmp_path / "run", train="projector", lr=1e-3)
    before, after = tensors(tiny.model), tensors(run / "model")
    assert {
        name.split(".")[0] for name in before if not torch.equal(before[name], after[name])
    } == {"projector"}
