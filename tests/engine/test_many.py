"""Files of answers: one line a question, in order; broken ones named, and a call that was broken
off goes on."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

import infer
import nanovlm.engine.many
from nanovlm.data.collate import prepare
from nanovlm.engine.many import answer_all, read_questions
from nanovlm.errors import NanoVLMError
from nanovlm.generate import generate
from nanovlm.inputs.image import open_image
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.sampling import Sampling
from tests.reference.models import tiny_vlm

PROMPT = "描述图片"
FLAGS = ("--device", "cpu", "--dtype", "float32", "--max-new-tokens", "6")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> VisionLanguageModel:
    return tiny_vlm(tmp_path_factory.mktemp("vlm"), head_dim=12, tie_word_embeddings=False, seed=2)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Forty images, one of them in a folder of its own, and one that is none."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number in range(39):
        Image.new("RGB", (30, 30), (6 * number, 99, 0)).save(folder / f"{number:02}.png")
    Image.new("RGB", (30, 30)).save(folder / "more" / "last.jpg")
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image, and not meant as one")
    return folder


def answered(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def alone(model: VisionLanguageModel, question) -> str:
    images = [open_image(path) for path in question.paths]
    batch = prepare(model, [question.messages], [images], add_generation_prompt=True)
    return model.tokenizer.decode(generate(model, batch, 6)[0]).strip()


def test_every_image_of_a_folder_gets_its_own_answer(model, photos, tmp_path, capsys):
    questions = read_questions(photos, PROMPT)
    answer_all(model, questions, tmp_path / "out.jsonl", 6, Sampling())
    lines = answered(tmp_path / "out.jsonl")
    names = [*(f"{number:02}.png" for number in range(39)), "broken.png", "more/last.jpg"]
    assert [line["where"] for line in lines] == names
    assert [line["images"] for line in lines] == [[name] for name in names]
    broken = lines.pop(39)
    questions.pop(39)
    assert "answer" not in broken and "not an image" in broken["error"]
    assert [line["answer"] for line in lines] == [alone(model, each) for each in questions]
    err = capsys.readouterr().err
    assert "not answered: broken.png: " in err and "not answered: 1 of 41" in err
    assert not list(tmp_path.glob("*.partial"))


def test_records_ask_their_own_questions_or_the_one_that_is_given(model, photos, tmp_path):
    entries = [
        {"image": "00.png"},
        {"image": "01.png", "question": "多少？"},
        {
            "images": ["02.png", "03.png"],
            "messages": [
                {"role": "user", "content": "<image><image>一样吗？"},
                {"role": "assistant", "content": "This answer is not shown to the model."},
            ],
        },
        {"prompt": "Hi"},
        {"image": "gone.png"},
        7,
    ]
    source = photos / "questions.jsonl"
    source.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + "{\n")
    questions = read_questions(source, PROMPT)
    answer_all(model, questions, tmp_path / "out.jsonl", 6, Sampling())
    lines = answered(tmp_path / "out.jsonl")
    assert [line["where"] for line in lines] == [f"{source}:{n}" for n in range(1, 8)]
    asked = [
        "".join(part if isinstance(part, str) else "<image>" for part in each.messages[-1].content)
        for each in questions[:4]
    ]
    assert asked == ["<image>\n描述图片", "<image>\n多少？", "<image><image>一样吗？", "Hi"]
    assert [line["answer"] for line in lines[:4]] == [alone(model, each) for each in questions[:4]]
    for line, reason in zip(lines[4:], ("does not exist", "is a JSON int", "JSON")):
        assert reason in line["error"]


def test_a_call_that_was_broken_off_goes_on_and_ends_with_the_same_bytes(
    model, photos, tmp_path, monkeypatch, capsys
):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    answer_all(model, read_questions(photos, PROMPT), whole, 6, Sampling())
    together, calls = nanovlm.engine.many.answer_together, []

    def interrupted(*arguments):
        calls.append(len(arguments[1]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return together(*arguments)

    monkeypatch.setattr(nanovlm.engine.many, "answer_together", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer_all(model, read_questions(photos, PROMPT), out, 6, Sampling())
    partial = tmp_path / "out.jsonl.partial"
    kept = partial / "answers.jsonl"
    assert not out.exists() and len(answered(kept)) == 17  # a batch, and the broken one
    kept.write_bytes(kept.read_bytes()[:-9])  # killed in the middle of a line
    with pytest.raises(NanoVLMError, match=r"out.jsonl.partial: holds answers to other questions"):
        answer_all(model, read_questions(photos, "Other?"), out, 6, Sampling())
    calls.clear()
    calls += [0, 0]
    answer_all(model, read_questions(photos, PROMPT), out, 6, Sampling())
    assert sum(calls) == 40 - 15 and "holds 16 of 41 answers" in capsys.readouterr().err
    assert out.read_bytes() == whole.read_bytes() and not partial.exists()


def test_the_command(model, photos, tmp_path, call):
    from nanovlm.hub.models import save_model

    save_model(model, tmp_path / "model")
    flags = ("--model", tmp_path / "model", *FLAGS)
    out = tmp_path / "out.jsonl"
    done = call(infer.main, "--batch", photos, "--prompt", PROMPT, "--out", out, *flags)
    assert (done.returncode, done.stdout) == (0, "") and len(answered(out)) == 41
    again = call(infer.main, "--batch", photos, "--prompt", PROMPT, "--out", out, *flags)
    assert again.returncode == 2 and "out.jsonl: is there already" in again.stderr
    for arguments, problem in [
        (("--batch", photos, "--out", tmp_path / "b"), "give --prompt"),
        (("--batch", photos, "--prompt", PROMPT), "name it with --out"),
        ((photos / "00.png", PROMPT, "--batch", photos, "--out", out), "give no others"),
        ((photos / "00.png", PROMPT, "--out", out), "belong to --batch"),
        (("--batch", photos / "gone.jsonl", "--out", tmp_path / "b"), "gone.jsonl"),
        (("--batch", photos, "--prompt", PROMPT, "--out", photos / "b"), "lies in a folder"),
        (("--batch", photos, "--prompt", "<image>", "--out", tmp_path / "b"), "only the program"),
    ]:
        done = call(infer.main, *arguments, *flags)
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert problem in done.stderr and "Traceback" not in done.stderr
    empty = tmp_path / "empty"
    empty.mkdir()
    done = call(infer.main, "--batch", empty, "--prompt", PROMPT, "--out", out, *flags)
    assert done.returncode == 2 and "empty: holds no images" in done.stderr
    shutil.rmtree(empty)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_answers_by_command(model, photos, tmp_path, call, kind):
    from nanovlm.hub.models import save_model

    save_model(model, tmp_path / "model")
    flags = ("--model", tmp_path / "model", *FLAGS, "--quantize", kind)
    done = call(infer.main, photos / "00.png", PROMPT, *flags)
    assert done.returncode == 0 and done.stdout.strip() and f"({kind})" in done.stderr
