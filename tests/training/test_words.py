"""Learning words: the written-out loss, the last layer's scale, and whole runs."""

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F

import train_stage1
from nanovlm.data.batches import Batches, BatchOptions, RecordEncoder
from nanovlm.data.records import read_records
from nanovlm.data.words import WordBatch, by_image, word_encoder
from nanovlm.errors import NanoVLMError
from nanovlm.hub.models import load_model
from nanovlm.inputs.chat import Message
from nanovlm.model.projector import PROJECTORS, ProjectorConfig, build_projector
from nanovlm.training.objectives.words import SCALE, Words, add_scale, finish_words
from nanovlm.training.run import run_stage
from nanovlm.training.settings import Settings
from tests.runs import metrics

WORDS = {"objective": "words", "word_images": 2, "batch_size": 3}


@pytest.fixture(scope="module")
def learner(tiny):
    """A model that is to learn words, the objective, and the batch of all its images."""
    model = load_model(tiny.model)
    records = by_image(read_records(tiny.data / "train.jsonl")[0])
    encoder = word_encoder(RecordEncoder.of(model), records, [], in_images=2, at_most=40)
    options = BatchOptions(batch_size=5, max_length=100, shuffle=False)
    add_scale(model)
    batch = Batches(records, encoder, options)[0].batch
    assert isinstance(batch, WordBatch)
    return model, Words.of(model, encoder.vocabulary), encoder.vocabulary, batch


def written_out(visual_tokens, rows, frequency, counts, scale):
    """The loss of one image, word by word."""
    mean, loss, probabilities = rows.mean(dim=0), torch.zeros(()), []
    for row, often, count in zip(rows, frequency, counts):
        exponents = [
            torch.exp(scale * F.cosine_similarity(token, row - mean, dim=0))
            for token in visual_tokens
        ]
        pooled = torch.log(torch.stack(exponents).mean())
        logit = pooled + math.log(often / (1 - often))
        probability = 1 / (1 + torch.exp(-logit))
        if count == 0:
            loss = loss - torch.log(1 - probability)
        loss = loss - count * torch.log(probability)
        probabilities.append(probability.item())
    return loss, probabilities


def test_loss_gradients_and_metrics_equal_the_formula(learner):
    model, objective, vocabulary, batch = learner
    loss, sums = objective(model, batch)
    rows = model.language_model.embed_tokens.weight[list(vocabulary.tokens)].detach()
    visual_tokens = model.encode_images(batch)
    scale, expected = model.projector.get_parameter(SCALE), torch.zeros(())
    hits = named = 0.0
    for tokens, counts in zip(visual_tokens, batch.counts):
        of_image, probabilities = written_out(
            tokens, rows, vocabulary.frequency, counts.tolist(), scale
        )
        expected = expected + of_image
        gains = [now - often for now, often in zip(probabilities, vocabulary.frequency)]
        best = sorted(range(len(gains)), key=lambda word: -gains[word])[:5]
        hits += sum(counts[word].item() > 0 for word in best) / 5
        named += sum(now >= 0.5 and count > 0 for now, count in zip(probabilities, counts.tolist()))
    assert objective.count_targets(batch) == 5
    torch.testing.assert_close(loss, expected, atol=1e-3, rtol=1e-5)
    assert sums.tolist() == pytest.approx([hits, named], abs=1e-4) and 0 < hits < 5
    parameters = list(model.projector.parameters())
    assert any(parameter is scale for parameter in parameters)
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_tokens_that_point_nowhere_leave_a_word_as_probable_as_its_frequency(learner):
    _, objective, vocabulary, _ = learner
    logits = objective.logits(torch.zeros(7, len(vocabulary)))
    assert logits.sigmoid().tolist() == pytest.approx(list(vocabulary.frequency), abs=1e-6)


def test_one_token_in_sixteen_is_enough_to_name_a_word(learner):
    _, objective, vocabulary, _ = learner
    similarities = torch.zeros(16, len(vocabulary))
    similarities[3, 0] = 30.0
    probabilities = objective.logits(similarities).sigmoid()
    assert probabilities[0] > 0.99 and objective.found(probabilities)[0] == 0
    assert probabilities[1:].tolist() == pytest.approx(vocabulary.frequency[1:], abs=1e-6)


def test_what_an_image_raises_comes_before_what_every_image_has(learner):
    _, objective, vocabulary, _ = learner
    most = int(torch.tensor(vocabulary.frequency).argmax())
    probabilities = torch.tensor(vocabulary.frequency)
    rare = int(probabilities.argmin())
    probabilities[rare] += 0.1
    assert probabilities[most] > probabilities[rare]
    assert objective.found(probabilities)[0] == rare


@pytest.mark.parametrize("kind", PROJECTORS)
def test_the_last_layer_scales_the_visual_tokens_of_every_projector(kind):
    torch.manual_seed(0)
    projector = build_projector(ProjectorConfig(kind, grid=2), 32, 24)
    patches = torch.randn(2, 16, 32)
    before = projector(patches)
    for parameter in projector.last_layer.parameters():
        parameter.data *= 3
    torch.testing.assert_close(projector(patches), 3 * before)


def test_afterwards_visual_tokens_are_as_long_as_the_words_embeddings(tiny, learner):
    _, objective, vocabulary, batch = learner
    model = load_model(tiny.model)
    before = model.projector(model.vision_features(batch.pixels))
    add_scale(model)
    finish_words(model, objective, iter([batch]))
    after = model.projector(model.vision_features(batch.pixels))
    rows = model.language_model.embed_tokens.weight[list(vocabulary.tokens)]
    length = after.norm(dim=-1).mean()
    torch.testing.assert_close(length, rows.norm(dim=-1).mean())
    torch.testing.assert_close(F.normalize(after, dim=-1), F.normalize(before, dim=-1))
    assert not hasattr(model.projector, SCALE)


@pytest.mark.parametrize("changes", [{}, {"cache_features": True}, {"dtype": "bfloat16"}], ids=str)
def test_a_run_learns_and_leaves_a_model_for_stage_1(tiny, tmp_path, changes):
    run = tiny.train(tmp_path / "run", max_steps=12, lr=1e-2, **WORDS, **changes)
    lines = metrics(run)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"precision_at_5", "words_named", "val_precision_at_5", "val_loss"} <= lines[-1].keys()
    assert (run / "samples.png").stat().st_size > 10_000
    shown = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(shown) == 4 and all(len(line["answer"].split()) <= 5 for line in shown)
    before, after = load_model(tiny.model), load_model(run / "model")  # strict: no scale is left
    assert torch.equal(
        before.language_model.embed_tokens.weight.to(after.language_model.embed_tokens.weight),
        after.language_model.embed_tokens.weight,
    )
    (tmp_path / "next").mkdir()
    tiny.train(tmp_path / "next" / "run", init=str(run / "model"), max_steps=1)


def test_the_language_model_does_not_run(tiny, tmp_path, monkeypatch):
    def run(*_, **__):
        raise AssertionError("the language model ran")

    monkeypatch.setattr("nanovlm.model.language_model.LanguageModel.hidden_states", run)
    tiny.train(tmp_path / "run", max_steps=2, **WORDS)


def test_a_resumed_run_goes_on_to_the_same_bits(tiny, tmp_path):
    whole = tiny.train(tmp_path / "whole", max_steps=6, save_every=3, val_every=2, **WORDS)
    half = tmp_path / "half"
    shutil.copytree(whole, half)
    shutil.rmtree(half / "model")
    shutil.rmtree(half / "checkpoints" / "step_6")
    settings = tiny.settings(half, max_steps=6, save_every=3, val_every=2, **WORDS)
    run_stage(Settings(**vars(settings) | {"resume": True}))
    assert metrics(whole) == metrics(half)
    for name in ("model/model.safetensors", "samples.jsonl"):
        assert (whole / name).read_bytes() == (half / name).read_bytes()


def test_batches_that_are_split_make_the_same_step(tiny, tmp_path):
    once = tiny.train(tmp_path / "once", max_steps=2, **WORDS | {"batch_size": 4})
    twice = tiny.train(tmp_path / "twice", max_steps=2, accumulate=2, **WORDS | {"batch_size": 2})
    for one, two in zip(metrics(once), metrics(twice)):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)


def test_each_image_is_seen_once_an_epoch_with_all_its_captions(tiny, tmp_path, capsys):
    run = tiny.train(tmp_path / "run", max_steps=0, epochs=1.0, **WORDS | {"batch_size": 1})
    records = by_image(read_records(tiny.data / "train.jsonl")[0])
    assert metrics(run)[-1]["step"] == metrics(run)[-1]["images"] == len(records)
    assert f"{len(records)} records to train on" in capsys.readouterr().err


def test_a_trained_vision_encoder_is_trained_too(tiny, tmp_path):
    train = {"train": "projector,vision_encoder", "lr": 1e-2}
    run = tiny.train(tmp_path / "run", max_steps=2, **WORDS, **train)
    before, after = load_model(tiny.model), load_model(run / "model")
    name = "patch_embedding.weight"
    assert not torch.equal(
        before.vision_encoder.get_parameter(name), after.vision_encoder.get_parameter(name)
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train": "projector,language_model"}, "without running the language model"),
        ({"train": "vision_encoder"}, "take projector"),
        ({"language_model_embedding": True}, "take --no-language-model-embedding"),
        ({"pack": 512}, "--pack 512 packs text"),
        ({"parallel": "fsdp"}, "take --parallel ddp"),
        ({"max_words": 0}, "--max-words is 0"),
        ({"word_images": 1000}, "no word occurs in the captions of 1000 of the"),
        (
            {"train": "projector,vision_encoder", "cache_features": True},
            "take vision_encoder out of --train",
        ),
    ],
    ids=str,
)
def test_what_is_refused(tiny, tmp_path, changes, expected):
    with pytest.raises(NanoVLMError, match=expected):
        tiny.train(tmp_path / "run", **WORDS | changes)


def write(path, *entries):
    path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
    return path


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("pairs", "has 'chosen', which is not read"),
        ("no images", "none of the 1 records has an image"),
        ("references", "has references and no answer"),
    ],
)
def test_records_of_another_kind_are_refused(tiny, tmp_path, call, kind, expected):
    image = str(next((tiny.data / "images").rglob("*.*")).resolve())
    entries = {
        "pairs": {"image": image, "prompt": "?", "chosen": "红色", "rejected": "蓝色"},
        "no images": {
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "红"}]
        },
        "references": {
            "image": image,
            "messages": [{"role": "user", "content": "<image>?"}],
            "references": ["红色"],
        },
    }
    data = write(tmp_path / "data.jsonl", entries[kind])
    flags = ["--init", tiny.model, "--objective", "words", "--data", data, "--out", tmp_path / "r"]
    refused = call(train_stage1.main, *flags, "--max-steps", "1", "--dtype", "float32")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "error: " in refused.stderr and expected in refused.stderr
    assert not (tmp_path / "r" / "checkpoints").exists()


def test_records_without_an_image_among_others_are_counted(tiny, tmp_path, capsys):
    lines = (tiny.data / "train.jsonl").read_text().splitlines()
    image = tiny.data.resolve()
    entries = [json.loads(line) for line in lines]
    for entry in entries:
        entry["image"] = str(image / entry["image"])
    turns = [Message("user", ("?",)), Message("assistant", ("红",))]
    blind = {"messages": [{"role": turn.role, "content": turn.text} for turn in turns]}
    data = write(tmp_path / "data.jsonl", *entries, blind)
    tiny.train(tmp_path / "run", max_steps=1, data=str(data), **WORDS)
    said = capsys.readouterr().err
    assert "1 records have no image whose words could be learned, and are left out" in said


def test_fewer_images_than_a_batch_has(tiny, tmp_path):
    """Then an image may follow itself; of words there is no prefix that both could share."""
    image = str(next((tiny.data / "images").rglob("*.*")).resolve())
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "红色圆形"}]
    data = write(tmp_path / "data.jsonl", {"image": image, "messages": turns})
    settings = {**WORDS, "word_images": 1, "val": str(data)}
    run = tiny.train(tmp_path / "run", max_steps=2, data=str(data), **settings)
    assert load_model(run / "model")
