"""The commands as a user runs them. What costs little runs in processes of its own, the many bad
inputs in this one."""

import io
import json
import os
import shutil
import signal
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import infer
from nanovlm.engine import loading
from nanovlm.errors import NanoVLMError
from nanovlm.evaluation import __main__ as evaluation
from nanovlm.hub.adapters import merged_tensors, save_adapter
from nanovlm.hub.loading import open_checkpoint
from nanovlm.hub.models import load_model, save_model
from nanovlm.hub.safetensors import save_file
from nanovlm.model.lora import adapter_parameters, add_adapters
from nanovlm.training.building import lora_config
from nanovlm.training.freezing import freeze
from nanovlm.training.settings import Settings, to_toml
from tests.runs import metrics


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "scene.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(
        path
    )
    return path


@pytest.fixture
def ask(tiny, call):
    """Run infer.py in this process: `ask(*arguments)` gives its exit code, stdout and stderr."""

    def answer(
        *arguments, model: Path = tiny.model, stdin: bytes = b"", main=infer.main
    ) -> tuple[int, str, str]:
        flags = (
            ["--model", model, "--device", "cpu", "--dtype", "float32"]
            if main is infer.main
            else []
        )
        tokens = (
            ["--max-new-tokens", "5"]
            if main is infer.main and "--max-new-tokens" not in arguments
            else []
        )
        done = call(main, *arguments, *flags, *tokens, stdin=stdin)
        return done.returncode, done.stdout, done.stderr

    return answer


@pytest.fixture
def refused(ask):
    """The one line of an `ask` that must be refused."""

    def call(*arguments, **options) -> str:
        code, out, err = ask(*arguments, **options)
        lines = [line for line in err.splitlines() if not line.startswith("model: ")]
        assert (code, out) == (2, "") and lines[0].startswith("error: "), (code, out, err)
        # Only the report of tensors that do not fit has more than one line.
        assert len(lines) == 1 or "the tensors do not fit" in lines[0]
        return err

    return call


# ---- asking


def test_the_answer_alone_is_on_stdout(tiny, image, ask):
    code, out, err = ask(image, "描述图片")
    assert code == 0 and out.endswith("\n") and out.count("\n") == 1 and len(out) > 1
    assert err == f"model: {tiny.model}\n"
    assert ask(image, "描述图片") == (code, out, err)  # greedy
    verbose = ask(image, "描述图片", "--verbose")
    assert verbose[1] == out and "first token after" in verbose[2] and "tokens/s" in verbose[2]


def test_none_one_and_several_images_each_open_the_question(image, ask, monkeypatch):
    asked, load = [], loading.load_model

    def loaded(*arguments, **options):
        model = load(*arguments, **options)
        chat = model.chat.encode
        monkeypatch.setattr(
            model.chat,
            "encode",
            lambda messages, lengths, **kind: (
                asked.append((list(messages), lengths)) or chat(messages, lengths, **kind)
            ),
        )
        return model

    monkeypatch.setattr(loading, "load_model", loaded)
    for count in (0, 1, 3):
        assert ask(*[image] * count, "你好")[0] == 0
    assert [(messages[0].num_images, len(lengths)) for messages, lengths in asked] == [
        (0, 0),
        (1, 1),
        (3, 3),
    ]
    asked.clear()
    code, out, _ = ask(image, "--chat", stdin="第一\n第二\n\n不问\n".encode())
    assert code == 0 and out.count("\n") == 2
    roles = [[message.role for message in messages] for messages, _ in asked]
    assert roles == [["user"], ["user", "assistant", "user"]]
    assert asked[1][0][1].content == (out.split("\n")[0],)  # it remembers what it said
    assert asked[1][0][2].content == ("第二",)


def test_a_chat_may_open_with_a_prompt_and_end_with_the_input(image, ask):
    assert ask(image, "你好", "--chat")[1].count("\n") == 1
    assert ask("--chat", stdin="你好".encode())[1].count("\n") == 1
    code, out, err = ask("--chat", stdin=b"\xff\xfe\n")  # no UTF-8, and still an answer
    assert code == 0 and out.count("\n") == 1 and "is not UTF-8 text; what could not be" in err


def test_a_prompt_that_is_not_utf_8_is_refused(image, refused):
    assert "the prompt is not UTF-8 text" in refused(image, "\udcff")  # the byte 0xff


def test_a_line_without_an_end_is_not_read_for_ever(ask):
    code, _, err = ask("--chat", stdin=b"a" * 2**21)
    assert code == 2 and "the prompt has more than 1,048,576 bytes; shorten it" in err


def test_sampling_follows_its_seed(image, ask):
    flags = [image, "描述图片", "--temperature", "3", "--max-new-tokens", "20"]
    first = ask(*flags, "--seed", "1")[1]
    assert ask(*flags, "--seed", "1")[1] == first != ask(*flags, "--seed", "2")[1]
    assert ask(*flags, "--top-k", "1")[1] == ask(image, "描述图片", "--max-new-tokens", "20")[1]
    assert ask(*flags, "--top-p", "0.5", "--repetition-penalty", "1.5")[0] == 0


def test_beams_answer_once_in_a_chat_and_for_many(image, ask, tmp_path):
    flags = ["--beams", "3", "--length-penalty", "0.5", "--max-new-tokens", "12"]
    code, out, err = ask(image, "描述图片", *flags, "--verbose")
    assert code == 0 and out != ask(image, "描述图片", "--max-new-tokens", "12")[1]
    assert "and with it all 12 tokens of the best of 3 beams" in err
    chat = ask(image, "描述图片", *flags, "--chat", stdin="第二\n\n".encode())[1]
    assert chat.count("\n") == 2 and chat.startswith(out)
    (tmp_path / "photos").mkdir()
    image.rename(tmp_path / "photos" / "scene.png")
    many = ["--batch", tmp_path / "photos", "--prompt", "描述图片", "--out", tmp_path / "a.jsonl"]
    assert ask(*many, *flags)[0] == 0
    assert json.loads((tmp_path / "a.jsonl").read_text())["answer"] == out.strip()


def test_an_adapter_answers_as_the_merged_model_does(tiny, image, ask, refused, tmp_path):
    model, settings = (
        load_model(tiny.model),
        Settings(train="projector,language_model", lora_rank=4),
    )
    config = lora_config(settings)
    add_adapters(model.language_model, config)
    freeze(model, settings)
    for parameter in (*adapter_parameters(model), *model.projector.parameters()):
        torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(model, tmp_path / "adapter", config)
    save_model(model, tmp_path / "merged", merged_tensors(model, torch.float32))
    code, out, err = ask(image, "描述图片", "--adapter", tmp_path / "adapter")
    assert code == 0 and err == f"model: {tiny.model}\nadapter: {tmp_path / 'adapter'}\n"
    assert out == ask(image, "描述图片", model=tmp_path / "merged")[1] != ask(image, "描述图片")[1]
    assert "nope: there is no such folder" in refused(image, "描述图片", "--adapter", "nope")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--temperature -1", "temperature is -1.0; it has to be 0 or more"),
        ("--temperature nan", "temperature is nan"),
        ("--temperature hot", "invalid float value: 'hot'"),
        ("--top-p 0", "top_p is 0.0"),
        ("--top-p 1.1", "--top-p is 1.1"),
        ("--top-k -1", "top_k is -1"),
        ("--repetition-penalty 0", "repetition_penalty is 0.0"),
        ("--seed 1.5", "invalid int value"),
        ("--seed 99999999999999999999", "seed is 99999999999999999999"),
        ("--max-new-tokens 0", "--max-new-tokens has to be 1 or more"),
        ("--max-new-tokens 5000", "exceed the language model's 1024 positions"),
        ("--beams 0", "beams is 0; it has to be above 0"),
        ("--beams 2 --temperature 1", "leave out beams, or temperature, top_p and top_k"),
        (
            "--beams 2 --compile",
            "beam search has no compiled steps; leave out --compile or --beams",
        ),
        ("--length-penalty 2", "length_penalty belongs to beam search; give beams of 2 or more"),
        ("--device tpu", "invalid choice: 'tpu'"),
        ("--dtype int8", "invalid choice: 'int8'"),
        ("--temp 1", "unrecognized arguments"),
        ("--bogus", "unrecognized arguments: --bogus"),
        ("--model", "expected one argument"),
    ],
)
def test_flags_that_are_refused(image, refused, flags, expected):
    assert expected in refused(image, "描述图片", *flags.split())


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a<|im_end|>b", "contains '<|im_end|>'"),
        ("<image>这是什么", "contains '<image>'"),
        ("</s>", "contains '</s>'"),
        ("<assistant>好", "contains '<assistant>'"),
        ("  ", "the prompt is empty"),
        ("长" * 3000, "positions; shorten the prompt"),
    ],
)
def test_prompts_that_are_refused(image, refused, prompt, expected):
    assert expected in refused(image, prompt)
    if prompt.strip():
        assert expected in refused("--chat", stdin=prompt.encode() + b"\n")


def test_what_is_missing_is_said(image, refused, tmp_path):
    assert "nothing asked" in refused()
    assert "is a file, and the last argument is the prompt" in refused(image)
    assert "nope: there is no such folder" in refused(image, "你好", model=Path("nope"))


# ---- images


def _bytes(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _bytes(Image.new("RGB", (30, 10), "red"), "JPEG", exif=exif)


ODD = {
    "cmyk.jpg": _bytes(Image.new("CMYK", (20, 20)), "JPEG"),
    "16bit.png": _bytes(Image.new("I;16", (20, 20), 40000), "PNG"),
    "palette.png": _bytes(Image.new("P", (20, 20)), "PNG", transparency=0),
    "one.png": _bytes(Image.new("RGB", (1, 1)), "PNG"),
    "moving.gif": _bytes(
        Image.new("P", (20, 20)), "GIF", save_all=True, append_images=[Image.new("P", (20, 20), 3)]
    ),
    "turned.jpg": _turned(),
    "alpha.webp": _bytes(Image.new("RGBA", (20, 20)), "WEBP"),
    "no extension": _bytes(Image.new("L", (9, 9)), "BMP"),
}
WHOLE = _bytes(
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "PNG"
)
BROKEN = {
    "truncated.png": (WHOLE[:2000], "cannot read the image"),
    "header.png": (WHOLE[:20], "cannot read the image"),
    "truncated.jpg": (_bytes(Image.open(io.BytesIO(WHOLE)), "JPEG")[:600], "cannot read the image"),
    "empty.png": (b"", "the file is empty"),
    "text.jpg": (b"hello", "not an image"),
    "large.png": (_png(30_000, 30_000), "more pixels than the limit of 67,108,864"),
    "bomb.png": (_png(2**31 - 1, 2**31 - 1), "pixels"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_images_are_answered(tmp_path, ask, name):
    (tmp_path / name).write_bytes(ODD[name])
    code, out, err = ask(tmp_path / name, "描述图片")
    assert code == 0 and out.strip() and err.count("\n") == 1


@pytest.mark.parametrize("name", BROKEN)
def test_broken_images_are_one_line(tmp_path, refused, name):
    (tmp_path / name).write_bytes(BROKEN[name][0])
    error = refused(tmp_path / name, "描述图片")
    assert name in error and BROKEN[name][1] in error
    assert (tmp_path / name).read_bytes() == BROKEN[name][0]


def test_images_that_are_not_there(tmp_path, refused):
    assert "No such file" in refused(tmp_path / "gone.png", "描述图片")
    assert "is a folder" in refused(tmp_path, "描述图片")


# ---- model folders


def _edit(name: str, change) -> callable:
    def damage(folder: Path) -> None:
        config = json.loads((folder / name).read_text())
        change(config)
        (folder / name).write_text(json.dumps(config))

    return damage


def _weights(change) -> callable:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        checkpoint = open_checkpoint(path)
        tensors = {name: checkpoint.tensor(name).clone() for name in checkpoint.keys()}
        change(tensors)
        save_file(tensors, path)

    return damage


def _header(change) -> callable:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        path.write_bytes(change(size, data[8 : 8 + size], data[8 + size :]))

    return damage


def _negative(size: int, header: bytes, rest: bytes) -> bytes:
    entries = json.loads(header)
    next(entry for name, entry in entries.items() if name != "__metadata__")["data_offsets"][0] = -4
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + rest


DAMAGES = {
    "truncated": (lambda folder: os.truncate(folder / "model.safetensors", 20_000), "cut off at"),
    "empty": (
        lambda folder: os.truncate(folder / "model.safetensors", 0),
        "too few for a safetensors file",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "holds neither model.safetensors",
    ),
    "negative offset": (_header(_negative), "impossible data_offsets [-4"),
    "huge header": (
        _header(lambda size, header, rest: (2**40).to_bytes(8, "little") + header + rest),
        "claims a header of",
    ),
    "header is no JSON": (
        _header(lambda size, header, rest: size.to_bytes(8, "little") + b"{" * size + rest),
        "model.safetensors",
    ),
    "wrong shape": (
        _weights(lambda tensors: tensors.update({"projector.up.bias": torch.zeros(3)})),
        "1 mis-shaped",
    ),
    "missing tensor": (
        _weights(lambda tensors: tensors.pop("vision_encoder.cls_token")),
        "1 missing",
    ),
    "unexpected tensor": (
        _weights(lambda tensors: tensors.update(more=torch.zeros(1))),
        "1 unexpected",
    ),
    "unknown key": (
        _edit("config.json", lambda config: config.update(colour=1)),
        "unknown key 'colour'",
    ),
    "unknown key of a part": (
        _edit("config.json", lambda config: config["language_model"].update(hiden_size=1)),
        "did you mean 'hidden_size'",
    ),
    "missing key": (
        _edit("config.json", lambda config: config.pop("vision_encoder")),
        "key 'vision_encoder' is missing",
    ),
    "wrong type": (
        _edit("config.json", lambda config: config["language_model"].update(hidden_size="16")),
        "expected a whole number",
    ),
    "another model": (
        _edit("config.json", lambda config: config.update(model_type="llava")),
        "model_type is 'llava'",
    ),
    "config is no JSON": (
        lambda folder: (folder / "config.json").write_text('{\n"a"'),
        "config.json:2:4: is not valid JSON",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.model").unlink(), "holds no tokenizer"),
    "damaged tokenizer": (
        lambda folder: os.truncate(folder / "tokenizer.model", 50),
        "is not a SentencePiece model",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_models_are_refused(tiny, tmp_path, image, refused, name):
    damage, expected = DAMAGES[name]
    shutil.copytree(tiny.model, tmp_path / "model")
    damage(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert expected in refused(image, "描述图片", model=tmp_path / "model")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}


# ---- evaluation


def test_evaluation_prints_one_json_line(tiny, tmp_path, ask):
    flags = [
        "--model",
        tiny.model,
        "--data",
        tiny.data / "val.jsonl",
        "--max-new-tokens",
        "3",
        "--dtype",
        "float32",
    ]
    keys = {
        "exact",
        "cider_d",
        "bleu_4",
        "chair_s",
        "chair_i",
        "n",
    }  # of scenes, also the objects named that are not there
    few = ["--control", "shuffled", "--limit", "9", "--beams", "3", "--length-penalty", "0"]
    for more in ([], ["--control", "blind"], few):
        code, out, _ = ask(
            *flags, *more, "--answers", tmp_path / "answers.jsonl", main=evaluation.main
        )
        result = json.loads(out)
        assert code == 0 and out.count("\n") == 1 and result.keys() == keys
        lines = (tmp_path / "answers.jsonl").read_text().splitlines()
        (tmp_path / "answers.jsonl").unlink()
        assert len(lines) == result["n"] and json.loads(lines[0]).keys() == {
            "where",
            "answer",
            "references",
        }
    assert result["n"] == 9


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--limit -1", "--limit"),
        ("--control dark", "invalid choice: 'dark'"),
        ("--device tpu", "invalid choice"),
        ("--dtype int8", "invalid choice"),
        ("--data nope.jsonl", "nope.jsonl: cannot be read"),
        ("--images nope", "is not a folder"),
        ("--answers nope/a.jsonl", "nope: is not a folder"),
        ("--model nope", "nope: there is no such folder"),
        ("--beams 2 --loss", "--loss answers nothing; leave out --beams"),
        ("--beams 2 --compile", "beam search has no compiled steps"),
        ("--bogus", "unrecognized"),
    ],
)
def test_what_evaluation_refuses(tiny, refused, flags, expected):
    arguments = ["--model", tiny.model, "--data", tiny.data / "val.jsonl", *flags.split()]
    assert expected in refused(*arguments, main=evaluation.main)


TWO_MARKERS = (
    '{"messages": [{"role": "user", "content": "<image><image>?"}], "image": "i.png", '
    '"references": ["a"]}'
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds no records"),
        (TWO_MARKERS, "the text has 2 <image> markers and the record 1 images"),
        ("{", "cannot be used"),
        ('{"messages": []}', "nor a question with an answer"),
        ("[]", "expected an object"),
    ],
)
def test_data_that_is_refused(tiny, tmp_path, monkeypatch, capsys, text, expected):
    (tmp_path / "data.jsonl").write_text(text)
    (tmp_path / "i.png").write_bytes(WHOLE)
    monkeypatch.setattr(
        sys,
        "argv",
        ["evaluation", "--model", str(tiny.model), "--data", str(tmp_path / "data.jsonl")],
    )
    with pytest.raises(NanoVLMError, match=expected):
        evaluation.main()
    assert capsys.readouterr().out == ""


# ---- in processes of their own


def wait(process) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out.decode(), err.decode()


def test_from_training_to_an_answer(tiny, tmp_path, image, command):
    """The newcomer's way, in an empty folder."""
    flags = [
        "--data",
        tiny.data / "train.jsonl",
        "--max-steps",
        "2",
        "--batch-size",
        "4",
        "--device",
        "cpu",
    ]
    code, out, err = wait(
        command(
            "train_stage1.py",
            "--vision-encoder",
            tiny.vision_encoder,
            "--language-model",
            tiny.language_model,
            *flags,
            cwd=tmp_path,
        )
    )
    assert (code, out) == (0, "") and err.endswith(
        "next:  python train_stage2.py --data FILE.jsonl\n"
    ), err
    code, out, err = wait(command("train_stage2.py", *flags, cwd=tmp_path))
    assert (code, out) == (0, "") and 'next:  python infer.py IMAGE "描述图片"' in err, err
    code, out, err = wait(
        command(
            "infer.py", image, "描述图片", "--max-new-tokens", "5", "--device", "cpu", cwd=tmp_path
        )
    )
    assert (
        code == 0 and out.strip() and "model: runs/stage2/model" in err and "toy world" not in err
    )
    code, out, err = wait(
        command(
            "-m",
            "nanovlm.evaluation",
            "--model",
            "runs/stage2/model",
            "--data",
            tiny.data / "val.jsonl",
            "--limit",
            "3",
            "--max-new-tokens",
            "3",
            cwd=tmp_path,
        )
    )
    assert code == 0 and json.loads(out)["n"] == 3, err


def test_a_stage_without_its_model_and_a_wrong_flag(tmp_path, command):
    processes = (
        command("train_stage2.py", cwd=tmp_path),
        command("infer.py", "gone.jpg", "描述图片", cwd=tmp_path),
    )
    code, out, err = wait(processes[0])
    assert (code, out) == (2, "") and err == (
        "error: runs/stage1/model: there is no model to start from; run train_stage1.py "
        "first, or give --init\n"
    )
    missing = "error: gone.jpg: cannot be read (No such file or directory); check the path\n"
    assert wait(processes[1]) == (2, "", missing)
    assert not list(tmp_path.iterdir())


def test_a_signal_saves_and_the_resumed_run_has_the_same_bits(tiny, tmp_path, command):
    """The signal reaches the whole process group, as that of a scheduler or Ctrl-C: the workers,
    too."""

    def start(out: str, *flags):
        settings = tiny.settings(
            Path(out),
            init=str(tiny.model),
            train="projector,language_model",
            accumulate=2,
            workers=2,
            max_steps=40,
            val_every=15,
            save_every=1000,
        )
        (tmp_path / "settings.toml").write_text(to_toml(settings))
        return command(
            "train_stage2.py",
            "--config",
            "settings.toml",
            *flags,
            cwd=tmp_path,
            start_new_session=True,
        )

    process, log = start("stopped"), tmp_path / "stopped" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 3):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    code, out, err = wait(process)
    assert (
        (code, out) == (143, "")
        and "go on with:  python train_stage2.py --config settings.toml --resume --out stopped\n"
        in err
    ), err
    assert "Traceback" not in err and 3 <= log.read_text().count("\n") < 38
    assert wait(start("whole"))[0] == 0
    code, out, err = wait(command("train_stage2.py", "--resume", "--out", "stopped", cwd=tmp_path))
    assert code == 0 and "next:" in err, err
    lines = metrics(tmp_path / "stopped")
    assert lines == metrics(tmp_path / "whole") and len(lines) == 40
    for name in (
        "model/model.safetensors",
        "checkpoints/step_40/optimizer.safetensors",
        "checkpoints/step_40/state.json",
    ):
        assert (tmp_path / "stopped" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes()
    assert wait(command("train_stage2.py", "--resume", "--out", "stopped", cwd=tmp_path)) == (
        2,
        "",
        "error: stopped: this run is finished, its model is in stopped/model\n",
    )
