"""The files that data tools, evaluation, benchmarks and the report read, and what they write."""

import base64
import csv
import io
import json
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch

from nanovlm.hub.names import CLIP, invert, translate
from nanovlm.hub.safetensors import save_file
from nanovlm.hub.toy import ASSETS
from nanovlm.hub.vision_configs import parse_vision_encoder_config
from nanovlm.model.vision_encoder import VisionEncoder
from nanovlm.training.settings import Settings, to_toml
from tests.fuzz.commands.flags import RECORD, read
from tests.fuzz.commands.toy import SCENE, SHIPPED, scenes
from tests.fuzz.damage import damaged_bytes, damaged_file, damaged_json, damaged_value, to_json
from tests.fuzz.inputs import Content, Input, Kind, nothing_lost

CLIP_CONFIG = {
    "model_type": "clip",
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 40,
        "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 28, "patch_size": 7,
    },
}  # fmt: skip
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 28},
    "crop_size": 28,
}
METRICS = [
    {"step": step, "loss": 2.0 / step, "seconds": step, "samples": step} for step in (1, 2, 3)
]
OTHER = (ASSETS / "scene2.png").read_bytes()
ANSWERS = [{"where": "a", "answer": "A dog on snow.", "references": ["A cat."]}] * 3
POPE = [
    {"question_id": n, "image": image, "text": "红色？", "label": ("yes", "no")[n % 2]}
    for n, image in enumerate(("a.png", "b.png", "a.png"))
]
SAMPLES = [{"step": 1, "where": "a.jsonl:1", "prompt": "?", "answer": "a", "reference": "b"}]


@cache
def _clip_weights() -> bytes:
    torch.manual_seed(0)
    encoder = VisionEncoder(parse_vision_encoder_config(CLIP_CONFIG["vision_config"]))
    published = translate(invert(CLIP))
    tensors = {
        f"vision_model.{published(name)}": each for name, each in encoder.state_dict().items()
    }
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "a")
        return (Path(folder) / "a").read_bytes()


def _lines(rng: Random, records: list[Any]) -> Content:
    """A .jsonl file with one damaged line."""
    lines = [to_json(record) for record in records]
    place = rng.randrange(len(lines))
    damaged = to_json(damaged_value(rng, records[place]))
    text = b"".join(line + b"\n" for line in lines)
    lines[place] = rng.choice((damaged, damaged, damaged_bytes(rng, lines[place])))
    return damaged_file(rng, text, lambda: b"".join(line + b"\n" for line in lines))


def _out(rng: Random, names: list[str], new: str) -> str:
    """Where to write: mostly somewhere new, else to an input, a folder, or nowhere."""
    return rng.choice((new, new, new, rng.choice(names), ".", "missing/a", f"folder/{new}"))


def make(rng: Random) -> Input:
    """A tool, its files of which one is damaged, and an output."""
    return rng.choice(TOOLS)(rng)


def _captions(rng: Random) -> Input:
    return Input({"a.jsonl": _lines(rng, ANSWERS)}, ("data_tools.caption_questions", "a.jsonl"))


def _pack(rng: Random) -> Input:
    files: dict[str, Content] = {"a.jsonl": _lines(rng, [RECORD] * 3), "a.png": SCENE}
    if rng.random() < 0.3:
        files["a.jsonl"] = to_json(RECORD) + b"\n"
        files["a.png"] = damaged_file(rng, SCENE, lambda: damaged_bytes(rng, SCENE))
    out = _out(rng, list(files), "shards")
    return Input(files, ("data_tools.pack_tar", "--data", "a.jsonl", "--out", out))


def _extract(rng: Random) -> Input:
    files: dict[str, Content] = {
        "a/config.json": to_json(CLIP_CONFIG),
        "a/preprocessor_config.json": to_json(PROCESSOR),
        "a/model.safetensors": _clip_weights(),
    }
    spoiled = rng.choice(list(files))
    if spoiled == "a/model.safetensors":
        weights = _clip_weights()
        files[spoiled] = damaged_file(
            rng, weights, lambda: damaged_bytes(rng, weights[:2000]) + weights[2000:]
        )
        if rng.random() < 0.3:
            files["a/pytorch_model.bin"] = files.pop(spoiled)
    else:
        config = CLIP_CONFIG if spoiled == "a/config.json" else PROCESSOR
        files[spoiled] = damaged_json(rng, config)
    out = _out(rng, ["a", *files], "out")
    return Input(files, ("data_tools.extract_vision", "a", "--out", out))


def _flickr(rng: Random) -> Input:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("a.png", "b.png"):
            header = tarfile.TarInfo(f"photos/{name}")
            header.size = len(SCENE)
            tar.addfile(header, io.BytesIO(SCENE))
    texts = {
        "a.tar": out.getvalue(),
        "zh.txt": "a.png#zhc#0 一只狗\nb.png#zhc#0 一个人\n".encode(),
        "en.txt": b"a.png#enc#0 a dog .\nb.png#enc#0 a man .\n",
        "names.txt": b"a.png\nb.png\n",
    }
    files: dict[str, Content] = dict(texts)
    spoiled = rng.choice(list(texts))
    files[spoiled] = damaged_file(rng, texts[spoiled], lambda: damaged_bytes(rng, texts[spoiled]))
    flags = ("--images", "a.tar", "--captions", "zh.txt", "--captions-en", "en.txt")
    flags += ("--names", "names.txt", "--out", _out(rng, list(files), "out"))
    return Input(files, ("data_tools.flickr8k_cn", *flags))


def _preferences(rng: Random) -> Input:
    files: dict[str, Content] = dict(scenes())
    records = [json.loads(line) for line in scenes()["s/train.jsonl"].splitlines()]
    files["s/train.jsonl"] = _lines(rng, records)
    out = _out(rng, ["s/train.jsonl"], "pairs.jsonl")
    return Input(files, ("data_tools.make_preferences", "--data", "s/train.jsonl", "--out", out))


def _scenes_again(rng: Random) -> Input:
    files: dict[str, Content] = {**scenes(), "s/val.jsonl": b"", "s/novel.jsonl": b""}
    files["s/world.json"] = damaged_json(rng, json.loads(scenes()["s/world.json"]))
    flags = ("--out", "s", "--scenes", "6", "--eval-scenes", "1", "--workers", "1")
    return Input(files, ("data_tools.make_scenes", *flags))


def _evaluation(rng: Random) -> Input:
    files: dict[str, Content] = {"a.jsonl": _lines(rng, [RECORD] * 2), "a.png": SCENE}
    flags = ("--model", SHIPPED, "--data", "a.jsonl", "--max-new-tokens", "2")
    out = _out(rng, list(files), "answers.jsonl")
    return Input(files, ("nanovlm.evaluation.__main__", *flags, "--answers", out))


def _benchmark(rng: Random) -> Input:
    """A table of MMBench or MMStar, or two files of POPE, of which one is damaged."""
    name = rng.choice(("pope", "mmbench", "mmstar"))
    if name == "pope":
        files: dict[str, Content] = {"a.json": _lines(rng, POPE), "a.png": SCENE, "b.png": OTHER}
        files |= {"coco_pope_popular.json": b"".join(to_json(line) + b"\n" for line in POPE)}
        data = "a.json,coco_pope_popular.json"
    else:
        data = "a.tsv"
        rows = [_row(name, number) for number in range(3)]
        place = rng.randrange(3)
        rows[place] = damaged_value(rng, rows[place])
        table = _tsv([row for row in rows if isinstance(row, dict)])
        files = {
            data: damaged_file(rng, table, lambda: rng.choice((table, damaged_bytes(rng, table))))
        }
    by = rng.choice((("likelihood",), ("generation", "--max-new-tokens", "2")))
    out = _out(rng, list(files), "answers.jsonl")
    flags = ("--model", SHIPPED, "--benchmark", name, "--data", data, "--by", *by, "--answers", out)
    return Input(files, ("nanovlm.evaluation.__main__", *flags))


def _row(name: str, number: int) -> dict[str, Any]:
    image = base64.b64encode((SCENE, OTHER)[number % 2]).decode()
    options = {"A": "red", "B": "blue", "C": "green"}
    row = {"index": number, "question": "颜色？", **options, "answer": "A", "category": "c"}
    kind = {"mmbench": "l2-category", "mmstar": "l2_category"}[name]
    return {**row, kind: "d", "image": image if number < 2 else "0"}


def _tsv(rows: list[dict[str, Any]]) -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, names, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode(errors="surrogatepass")


def _report(rng: Random) -> Input:
    settings = to_toml(Settings()).encode()
    files: dict[str, Content] = {
        "run/metrics.jsonl": _lines(rng, METRICS),
        "run/settings.toml": settings,
    }
    if rng.random() < 0.3:
        files["run/settings.toml"] = damaged_file(
            rng, settings, lambda: damaged_bytes(rng, settings)
        )
    return Input(files, ("nanovlm.report", "run", "--out", _out(rng, list(files), "out.png")))


def _draw(rng: Random) -> Input:
    files: dict[str, Content] = {
        "run/samples.jsonl": _lines(rng, SAMPLES),
        "a.jsonl": to_json(RECORD) + b"\n",
        "a.png": SCENE,
    }
    return Input(
        files, ("data_tools.draw_samples", "run", "--out", _out(rng, list(files), "out.png"))
    )


def _check(rng: Random) -> Input:
    files: dict[str, Content] = {"a.jsonl": _lines(rng, [RECORD] * 3), "a.png": SCENE}
    if rng.random() < 0.3:
        files["a.png"] = damaged_file(rng, SCENE, lambda: damaged_bytes(rng, SCENE))
    out = _out(rng, list(files), "out")
    flags = rng.choice((("--out", out), ("--drop", "broken,duplicates", "--keep", out)))
    return Input(files, ("data_tools.check.__main__", "a.jsonl", *flags, "--workers", "0"))


def _mix(rng: Random) -> Input:
    files: dict[str, Content] = {
        "a.jsonl": _lines(rng, [RECORD] * 3),
        "b/b.jsonl": to_json({**RECORD, "image": "../a.png"}) + b"\n",
        "a.png": SCENE,
    }
    weights = rng.choice((("a.jsonl", "b/b.jsonl"), ("a.jsonl=1", "b/b.jsonl=2.5")))
    out = _out(rng, list(files), "out.jsonl")
    return Input(files, ("data_tools.mix", *weights, "--out", out))


def check(input: Input, folder: Path, was_read: bool) -> None:
    """As `nothing_lost`, but for photos: they are copied one by one, and records come last."""
    only_photos = all("/images/" in name for name in input.added(folder))
    nothing_lost(input, folder, was_read or only_photos)


TOOLS = (
    _captions, _pack, _pack, _extract, _extract, _flickr, _preferences, _scenes_again,
    _evaluation, _benchmark, _benchmark, _report, _draw, _check, _mix,
)  # fmt: skip
KIND = Kind("tools", make, read, short=4, long=240, check=check)
