"""Vision encoders extracted from tiny checkpoints of every layout, compared with the originals."""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionModel, SiglipVisionModel

from data_tools import extract_vision
from nanovlm.hub.image_configs import parse_image_config
from nanovlm.hub.models import load_vision_encoder
from nanovlm.hub.safetensors import SafetensorsFile, save_file
from nanovlm.utils.files import read_json
from tests.reference.models import whole_model

REPOSITORY = Path(__file__).parents[2]
FIXTURE = REPOSITORY / "tests" / "fixtures" / "qwen_vl_vision.safetensors"
PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def extract(call):
    """Run the command: `extract(folder)` writes to its folder "vision_encoder"."""

    def completed(source: Path, out: Path | None = None) -> subprocess.CompletedProcess[str]:
        return call(extract_vision.main, source, "--out", out or source / "vision_encoder")

    return completed


@pytest.fixture
def fails(extract):
    """The command ends with this one-line error and writes no weights."""

    def refused(source: Path, message: str) -> None:
        done = extract(source)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
        assert not (source / "vision_encoder" / "model.safetensors").exists()

    return refused


def rename(folder: Path, change) -> None:
    """Give the tensors of a folder other names, as other versions of the library wrote them."""
    file = SafetensorsFile(folder / "model.safetensors")
    tensors = {change(name): file.tensor(name) for name in file.keys()}
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "model_type, text",
    [
        ("siglip", "logit_bias, logit_scale, text_model"),
        ("clip", "logit_scale, text_model"),
        ("llava", "language_model"),
        ("smolvlm", "lm_head, model.connector, model.text_model"),
        ("idefics3", "lm_head, model.connector, model.text_model"),
    ],
)
@torch.inference_mode()
def test_the_vision_encoder_of_a_whole_model(model_type, text, tmp_path, extract):
    reference = whole_model(tmp_path, model_type)
    processor = {"image_processor_type": "ViTImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    taken, left = extract(tmp_path).stderr.splitlines()
    ours = load_vision_encoder(tmp_path / "vision_encoder")
    torch.testing.assert_close(ours(PIXELS), reference(PIXELS).last_hidden_state, atol=1e-5, rtol=0)
    assert read_json(tmp_path / "vision_encoder" / "preprocessor_config.json") == processor
    tensors = SafetensorsFile(tmp_path / "vision_encoder" / "model.safetensors").keys()
    assert f"{len(tensors)} tensors, 0.1 MB" in taken and text in left
    classes = {"siglip": SiglipVisionModel, "clip": CLIPVisionModel, "llava": CLIPVisionModel}
    if model_type in classes:  # the folder can be read by the reference too
        theirs = classes[model_type].from_pretrained(tmp_path / "vision_encoder")
        torch.testing.assert_close(
            ours(PIXELS), theirs(PIXELS).last_hidden_state, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize(
    "prefix",
    ["vision_tower.vision_model.", "model.vision_tower.", "model.vision_tower.vision_model."],
)
@torch.inference_mode()
def test_every_prefix_of_llavas_vision_encoder(prefix, tmp_path, extract):
    reference = whole_model(tmp_path, "llava")
    rename(tmp_path, lambda name: re.sub(r"^vision_tower\.", prefix, name))
    assert extract(tmp_path).returncode == 0
    ours = load_vision_encoder(tmp_path / "vision_encoder")
    hidden_states = reference(PIXELS, output_hidden_states=True).hidden_states
    expected = hidden_states[-2][:, 1:]
    torch.testing.assert_close(ours.patches(PIXELS, -2, norm=False), expected, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_shards_without_the_vision_encoder_may_be_absent(tmp_path, extract, fails):
    reference = whole_model(tmp_path, "smolvlm", max_shard_size="10KB")
    places = read_json(tmp_path / "model.safetensors.index.json")["weight_map"]
    needed = {shard for name, shard in places.items() if name.startswith("model.vision_model.")}
    assert len(needed) > 1 and needed != set(places.values())
    for shard in set(places.values()) - needed:
        (tmp_path / shard).unlink()
    done = extract(tmp_path)
    assert done.returncode == 0
    ours = load_vision_encoder(tmp_path / "vision_encoder")
    torch.testing.assert_close(ours(PIXELS), reference(PIXELS).last_hidden_state, atol=1e-5, rtol=0)
    assert "no preprocessor_config.json" in done.stderr
    absent = tmp_path / sorted(needed)[0]
    absent.unlink()
    (tmp_path / "vision_encoder" / "model.safetensors").unlink()
    fails(tmp_path, f"{absent}: is missing, and the index places")


def qwen_vl(folder: Path) -> dict[str, Tensor]:
    """A Qwen-VL in three shards of pickles, as published; the first, of text, is absent."""
    file = SafetensorsFile(FIXTURE)
    tensors = {name: file.tensor(name) for name in file.keys()}
    names = [name for name in tensors if name.startswith("transformer.visual.")]
    visual = {**read_json(FIXTURE.with_suffix(".json"))["visual"], "image_start_id": 151857}
    config = {"model_type": "qwen", "hidden_size": 8, "visual": visual}
    (folder / "config.json").write_text(json.dumps(config))
    shards = [f"pytorch_model-0000{number}-of-00003.bin" for number in (1, 2, 3)]
    weight_map = {"transformer.wte.weight": shards[0]}
    for shard, chosen in ((shards[1], names[::2]), (shards[2], names[1::2])):
        weight_map |= dict.fromkeys(chosen, shard)
        torch.save({name: tensors[name] for name in chosen}, folder / shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return tensors


@torch.inference_mode()
def test_qwen_vl(tmp_path, extract):
    tensors = qwen_vl(tmp_path)
    done = extract(tmp_path)
    assert done.returncode == 0
    ours = load_vision_encoder(tmp_path / "vision_encoder")
    torch.testing.assert_close(
        ours(tensors["fixture.pixels_112"]), tensors["fixture.pooled_112"], atol=2e-5, rtol=0
    )
    image = parse_image_config(read_json(tmp_path / "vision_encoder" / "preprocessor_config.json"))
    assert (image.height, image.fit, image.resample) == (56, "squash", "bicubic")  # published: 448
    assert image.mean == (0.48145466, 0.4578275, 0.40821073)
    assert "1 tensors (transformer.wte)" in done.stderr


def test_a_pickle_that_is_not_plain_tensors_is_not_run(tmp_path, fails):
    qwen_vl(tmp_path)
    shard = tmp_path / "pytorch_model-00002-of-00003.bin"

    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harmed",)

    torch.save({"transformer.visual.proj": Harm()}, shard)
    fails(tmp_path, "holds more than plain tensors")
    torch.save({"transformer.visual.proj": [1, 2]}, shard)
    fails(tmp_path, "holds more than plain tensors")
    shard.write_bytes(pickle.dumps({"transformer.visual.proj": 1}))
    fails(tmp_path, f"{shard}: ")
    shard.write_bytes(b"")
    fails(tmp_path, f"{shard}: is no PyTorch file but an empty file")
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    fails(tmp_path, f"{shard}: is no PyTorch file but a Git LFS pointer: `git lfs pull`")
    torch.save({7: torch.zeros(1)}, shard)
    fails(tmp_path, "holds more than plain tensors")
    torch.save({"transformer.visual.proj": torch.zeros(1)}, shard)
    shard.write_bytes(shard.read_bytes()[:-30])
    fails(tmp_path, f"{shard}: cannot be read")
    assert not (tmp_path / "harmed").exists()


def test_a_folder_without_a_vision_encoder_is_refused(tmp_path, fails):
    def config(**settings) -> None:
        (tmp_path / "config.json").write_text(json.dumps(settings))

    fails(tmp_path, "config.json: cannot be read")
    config(model_type="qwen2")
    fails(tmp_path, "model_type is 'qwen2'; vision encoders are extracted from siglip, clip")
    config(model_type="qwen")
    fails(tmp_path, "has no table 'visual', so it has no vision encoder")
    config(model_type="llava", vision_config={"model_type": "pixtral"})
    fails(tmp_path, "model_type is 'pixtral'; implemented are")
    config(model_type="siglip", vision_config={})
    fails(tmp_path, "holds none of model.safetensors")
    save_file({"text_model.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    fails(tmp_path, "none of its 1 tensors belongs to a vision encoder")


def test_a_folder_is_not_overwritten_and_not_left_half_written(tmp_path, extract):
    whole_model(tmp_path, "clip")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "holds config.json already" in extract(tmp_path, out=tmp_path).stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    rename(tmp_path, lambda name: name.replace("layers.2.", "layers.7."))
    assert extract(tmp_path).returncode == 2
    assert not (tmp_path / "vision_encoder").exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak memory")
def test_memory_stays_far_below_the_checkpoints_size(tmp_path):
    """The peak memory of extracting a vision encoder of 3 MB from 250 MB of pickles."""
    qwen_vl(tmp_path)
    index = read_json(tmp_path / "pytorch_model.bin.index.json")
    shard = tmp_path / "pytorch_model-00002-of-00003.bin"
    text = {"transformer.wte.weight": torch.ones(60, 2**20)}
    torch.save(torch.load(shard, weights_only=True) | text, shard)
    index["weight_map"]["transformer.wte.weight"] = shard.name
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    code = """
import re, sys
from pathlib import Path
from data_tools import extract_vision
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
extract_vision.extract(Path(sys.argv[1]), Path(sys.argv[1]) / "vision_encoder")
print(peak() - before)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert 0 < int(result.stdout) * 1024 < 160e6  # 80 MB are what the first call imports


def test_tensors_that_do_not_fit_are_listed_a_line_each(tmp_path, extract):
    whole_model(tmp_path, "clip")
    rename(tmp_path, lambda name: name.replace("vision_model.post_layernorm", "vision_model.norm"))
    done = extract(tmp_path)
    lines = [line for line in done.stderr.splitlines() if "preprocessor_config" not in line]
    assert done.returncode == 2 and not (tmp_path / "vision_encoder").exists()
    problem = "the tensors do not fit VisionEncoder (2 unexpected)"
    assert lines[0].startswith(f"error: {tmp_path}: {problem}")
    assert "    norm.weight (24,)" in lines
