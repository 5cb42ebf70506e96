"""Published folders in the commands: asked, evaluated, trained further."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import infer
import train_stage2
from nanovlm.data.collate import prepare
from nanovlm.engine.conversation import Conversation
from nanovlm.evaluation import __main__ as evaluation
from nanovlm.hub.models import load_model
from nanovlm.inputs.chat import IMAGE, Message
from nanovlm.inputs.image import open_image
from nanovlm.memory import __main__ as memory
from tests.reference.published import llava_folder, smolvlm_folder
from tests.runs import metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A SmolVLM and a LLaVA, an image, and records about it."""
    root = tmp_path_factory.mktemp("fetched")
    smolvlm_folder(root / "SmolVLM2-256M-Instruct")
    llava_folder(root / "llava-1.5-7b-hf", max_shard_size="30KB")
    Image.effect_noise((50, 41), 80).convert("RGB").save(root / "photo.jpg")
    turns = [("human", "<image>\n图中有几个圆形？"), ("gpt", "三个。")]
    record = {
        "image": "photo.jpg",
        "conversations": [dict(zip(("from", "value"), it)) for it in turns],
    }
    (root / "data.json").write_text(json.dumps([record] * 4), encoding="utf-8")
    return root


NAMES = ("SmolVLM2-256M-Instruct", "llava-1.5-7b-hf")


@pytest.mark.parametrize("name", NAMES)
def test_infer_answers_about_a_photo_in_chinese(folder, command, name):
    flags = ("--max-new-tokens", "6", "--verbose")
    process = command("infer.py", "photo.jpg", "描述图片", "--model", name, *flags, cwd=folder)
    out, err = process.communicate()
    assert process.returncode == 0 and out.strip(), err.decode()
    assert f"model: {name}" in err.decode()
    model = load_model(folder / name)
    question = [Message("user", (IMAGE, "\n", "描述图片"))]
    photo = open_image(folder / "photo.jpg")
    batch = prepare(model, [question], [[photo]], add_generation_prompt=True)
    assert f"{batch.input_ids.shape[1]} prompt tokens" in err.decode()


def test_infer_keeps_a_conversation_going(folder, call):
    arguments = (folder / "photo.jpg", "--chat", "--model", folder / NAMES[0])
    done = call(
        infer.main, *arguments, "--max-new-tokens", "4", stdin="几个？\n在哪里？\n\n".encode()
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) >= 2, done.stderr


def test_what_only_the_program_may_write_is_refused(folder, call):
    for name, token in zip(NAMES, ("<end_of_utterance>", "</s>")):
        done = call(infer.main, f"a {token} b", "--model", folder / name)
        assert done.returncode == 2 and f"the prompt contains '{token}'" in done.stderr


def test_the_space_before_an_answer_is_not_shown(folder, call, monkeypatch):
    model = load_model(folder / NAMES[0])
    ids = [*model.tokenizer.encode(" A girl"), model.chat.end_of_turn_id]

    def written(conversation, batch, max_new_tokens, sampling, on_tokens):
        for id in ids[:-1]:
            on_tokens([id])
        return ids[:-1]

    monkeypatch.setattr(Conversation, "generate", written)
    done = call(infer.main, folder / "photo.jpg", "描述图片", "--model", folder / NAMES[0])
    assert done.stdout == "A girl\n"
    # In a record as in an answer, the space is the model's to write.
    answer = model.chat.encode([Message("user", ("?",)), Message("assistant", ("A girl",))])
    assert [label for label in answer.labels if label >= 0] == ids


@pytest.mark.parametrize("name", NAMES)
def test_they_are_evaluated_and_their_memory_is_predicted(folder, call, name):
    data = ("--data", folder / "data.json", "--max-new-tokens", "3", "--device", "cpu")
    done = call(evaluation.main, "--model", folder / name, *data)
    assert done.returncode == 0 and json.loads(done.stdout)["n"] == 4, done.stderr
    done = call(memory.main, "--init", folder / name, "--stage", "2", "--device", "cpu")
    assert done.returncode == 0 and "language_model" in done.stdout, done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_they_are_trained_further_and_saved_as_ours(folder, call, tmp_path, name):
    arguments = ("--data", folder / "data.json", "--max-steps", "2", "--batch-size", "2")
    flags = ("--log-every", "1", "--device", "cpu", "--dtype", "float32", "--out", tmp_path / "run")
    done = call(train_stage2.main, "--init", folder / name, *arguments, *flags)
    assert done.returncode == 0, done.stderr
    losses = [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert len(losses) == 2 and losses[1] < losses[0]
    before, after = load_model(folder / name), load_model(tmp_path / "run" / "model")
    assert after.config == before.config
    question = [Message("user", (IMAGE, "\n图中有几个圆形？")), Message("assistant", ("三个。",))]
    photo = open_image(folder / "photo.jpg")
    losses = []
    for model in (before, after):
        batch = prepare(model, [question], [[photo]])
        with torch.inference_mode():
            losses.append(model(batch).item() / len(batch.targets))
    assert losses[1] < losses[0]
    done = call(infer.main, folder / "photo.jpg", "描述图片", "--model", tmp_path / "run/model")
    assert done.returncode == 0, done.stderr


def test_a_wrong_folder_is_one_line(folder, call, tmp_path):
    other = tmp_path / "llava-v1.6-vicuna-7b-hf"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "llava_next", "text_config": {}}))
    done = call(infer.main, "描述图片", "--model", other)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "LLaVA-NeXT, which cuts images" in done.stderr
