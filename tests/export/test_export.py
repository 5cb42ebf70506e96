"""What the command writes and refuses, without `transformers`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovlm.errors import NanoVLMError
from nanovlm.export import __main__ as export
from nanovlm.export.families import published_form
from nanovlm.hub.adapters import load_adapter, save_adapter
from nanovlm.hub.loading import open_checkpoint
from nanovlm.hub.models import load_model, save_model
from nanovlm.inputs.chat import IMAGE, ChatConfig, Message
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.inputs.jinja import read_jinja, write_jinja
from nanovlm.model.language_model import LanguageModelConfig
from nanovlm.model.lora import LoRAConfig, adapter_parameters, add_adapters, merge_adapters
from nanovlm.model.projector import ProjectorConfig
from nanovlm.model.vlm import VisionLanguageModel
from tests.reference.models import tiny_vlm

TINY = Path(__file__).parents[2] / "nanovlm/assets/tiny-vlm"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> VisionLanguageModel:
    model = tiny_vlm(tmp_path_factory.mktemp("parts"), ProjectorConfig("mlp"))
    model.config = replace(model.config, vision_norm=False)
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    """The folder of `model`."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(model, folder)
    return folder


def test_a_folder_is_complete_and_read_back(call, folder, tmp_path):
    result = call(export.main, folder, "--out", tmp_path / "out")
    assert result.returncode == 0 and result.stdout == ""
    assert "LlavaForConditionalGeneration" in result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert load_model(tmp_path / "out").config.image == load_model(folder).config.image


def test_shards_of_a_size_and_another_dtype(call, folder, tmp_path):
    flags = ("--shard-size", "20KB", "--dtype", "bfloat16")
    assert call(export.main, folder, "--out", tmp_path / "out", *flags).returncode == 0
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    checkpoint = open_checkpoint(tmp_path / "out")
    sizes = dict.fromkeys((path.name for path in files), 0)
    for name in checkpoint.keys():
        assert checkpoint.dtype(name) == torch.bfloat16
        sizes[index["weight_map"][name]] += checkpoint.tensor(name).nbytes
    assert sum(sizes.values()) == index["metadata"]["total_size"]
    biggest = max(checkpoint.tensor(name).nbytes for name in checkpoint.keys())
    assert max(sizes.values()) <= max(20_000, biggest)
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    again, before = load_model(tmp_path / "out"), load_model(folder, torch.bfloat16)
    for name, tensor in before.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_an_adapter_is_merged(call, folder, tmp_path):
    model, config = load_model(folder), LoRAConfig(2, 4.0, "q_proj,up_proj")
    add_adapters(model.language_model, config)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter_parameters(model):
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    save_adapter(model, tmp_path / "adapter", config)
    flags = ("--merge-adapter", tmp_path / "adapter")
    assert call(export.main, folder, "--out", tmp_path / "out", *flags).returncode == 0
    merged = load_model(folder)
    load_adapter(merged, tmp_path / "adapter")
    merge_adapters(merged)
    tensors = load_model(tmp_path / "out").state_dict()
    name = "language_model.blocks.0.attention.q_proj.weight"
    assert not torch.equal(merged.get_parameter(name), load_model(folder).get_parameter(name))
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensors[name], tensor, atol=1e-6, rtol=0)


def test_what_is_there_stays(call, folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    out, adapter = tmp_path / "out", tmp_path / "full"
    cases = {
        "holds notes.txt already": (folder, "--out", tmp_path / "full"),
        "lies in a folder that this command reads": (folder, "--out", folder / "out"),
        "is read by this command": (folder, "--out", folder),
        "there is no such folder": (tmp_path / "none", "--out", out),
        "--shard-size 'big' is no size": (folder, "--out", out, "--shard-size", "big"),
        "no adapter.json": (folder, "--out", out, "--merge-adapter", adapter),
        "--out": (folder,),
    }
    for message, arguments in cases.items():
        result = call(export.main, *arguments)
        assert result.returncode == 2 and message in result.stderr, (message, result.stderr)
        assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
    assert (tmp_path / "full/notes.txt").read_text() == "mine"


def test_a_value_beyond_float16_leaves_no_folder(call, folder, tmp_path):
    model = load_model(folder)
    model.get_parameter("projector.up.weight").data[0, 0] = 1e5
    save_model(model, tmp_path / "large")
    arguments = (tmp_path / "large", "--out", tmp_path / "out", "--dtype", "float16")
    result = call(export.main, *arguments)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "multi_modal_projector.linear_1.weight: holds values that are no" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


TILES = ImageConfig(28, 28, "tiles", max_tiles=2)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"projector": ProjectorConfig("resampler")}, "has the projector resampler, .* linear or mlp"),
    ({"projector": ProjectorConfig("bilinear")}, "has the projector bilinear"),
    ({"vision_norm": True}, r"\(vision_norm\), .* --no-vision-norm can be exported"),
    ({"bidirectional_images": True}, "without --bidirectional-images"),
    ({"image": TILES}, "cuts images into tiles for the projector mlp"),
    ({"projector": ProjectorConfig("pixel_shuffle")}, "images that are not cut into tiles"),
    ({"vision_first_token": 3}, "leaves out the first 3 tokens"),
    (
        {"projector": ProjectorConfig("pixel_shuffle"), "image": TILES},
        "has a pixel shuffle with a bias",
    ),
    (
        {"projector": ProjectorConfig("pixel_shuffle", bias=False), "image": TILES},
        "--vision-layer -1 --vision-norm",
    ),
    (
        {
            "projector": ProjectorConfig("pixel_shuffle", bias=False),
            "image": TILES,
            "vision_norm": True,
        },
        "has a vision encoder with a class token",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_has_no_counterpart_is_refused_by_name(model, monkeypatch, changes, message):
    monkeypatch.setattr(model, "config", replace(model.config, **changes))
    with pytest.raises(NanoVLMError, match=message):
        published_form(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 4}, r"experts \(num_experts\)"),
        ({"positions": "learned"}, "learned positions .* rotary positions can be"),
        ({"norm": "layer"}, "layer norms"),
        ({"mlp": "gelu"}, "MLPs without a gate"),
        ({"embedding_size": 8, "tie_word_embeddings": False}, "a reducer"),
        (
            {"rope_type": "dynamic_ntk", "original_max_position_embeddings": 64},
            "the first Qwen's dynamic NTK",
        ),
        ({"qk_norm": True}, "mixes what Qwen3"),  # beside Qwen2's biases
    ],
)
def test_language_models_that_no_family_has_are_refused(model, monkeypatch, changes, message):
    language = replace(model.config.language_model, **changes)
    monkeypatch.setattr(model, "config", replace(model.config, language_model=language))
    with pytest.raises(NanoVLMError, match=message):
        published_form(model)


def test_an_image_that_ends_otherwise_than_it_begins_is_refused(model, monkeypatch):
    """As Qwen's tokens did in models of before."""
    settings: dict[str, Any] = {
        "vision_encoder": replace(model.config.vision_encoder, class_token=False),
        "projector": ProjectorConfig("pixel_shuffle", bias=False),
        "image": TILES,
        "vision_norm": True,
    }
    monkeypatch.setattr(model, "config", replace(model.config, **settings))
    for frame, message in (
        (("<|vision_start|>", "<|vision_end|>"), r"ends an image with '<\|vision_end\|>'"),
        (("", ""), "has no token before a tile"),
    ):
        monkeypatch.setattr(model.chat, "tile_frame", frame)
        with pytest.raises(NanoVLMError, match=message):
            published_form(model)


def test_settings_that_change_no_forward_pass_are_no_obstacle(model, monkeypatch):
    language: LanguageModelConfig = replace(
        model.config.language_model, dropout=0.1, reducer_size=7, balance_loss=0.5
    )
    monkeypatch.setattr(model, "config", replace(model.config, language_model=language))
    assert published_form(model).config["text_config"]["model_type"] == "qwen2"


def test_the_card_says_what_the_run_folders_say(call, folder, tmp_path):
    runs = [tmp_path / "runs" / name for name in ("stage1", "stage2")]
    for run, settings in zip(
        runs,
        (
            {"vision_encoder": "/home/me/dinov2", "language_model": "weights/qwen2"},
            {"init": str(runs[0] / "model"), "train": "projector,language_model", "lora_rank": 8},
        ),
    ):
        run.mkdir(parents=True)
        save_model(load_model(folder), run / "model")
        settings = {"data": "/secret/place/data/train.jsonl", **settings}
        lines = (f"{name} = {json.dumps(value)}" for name, value in settings.items())
        (run / "settings.toml").write_text("\n".join(lines))
        log = [{"step": step, "loss": 4 / step, "samples": 8 * step} for step in (1, 2, 4)]
        log[1]["val_loss"] = 1.5
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    assert call(export.main, runs[1] / "model", "--out", tmp_path / "out").returncode == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "| stage1 | – | data/train.jsonl | 4 | 32 | 2.3333 | 1.5000 at step 2 |" in card
    assert "| stage2 | projector, language_model (LoRA of rank 8) | data/train.jsonl" in card
    assert "`me/dinov2` and `weights/qwen2`" in card
    assert "secret" not in card and str(tmp_path) not in card
    alone = tmp_path / "alone"
    assert call(export.main, folder, "--out", alone).returncode == 0
    assert "## Training" not in (alone / "README.md").read_text()


def test_a_chat_template_is_known_again_and_a_changed_one_is_refused(model):
    chat = model.chat
    source = write_jinja(chat)
    assert read_jinja(source, model.tokenizer) == chat.config
    assert read_jinja("{% for message in messages %}…", model.tokenizer) is None
    for changed in (
        source.replace("user", "human"),
        source + "{{ 'more' }}",
        "{#- nanovlm {} -#}\n",
    ):
        with pytest.raises(NanoVLMError, match="export the model again"):
            read_jinja(changed, model.tokenizer)


def test_settings_of_a_template_may_hold_anything(model, monkeypatch):
    system = "a \"b\" 'c' {{ d }} {% e %} {# f #} \\n\n你好 😀 -#}"
    config = replace(model.config.chat, default_system=system, end_ids=())
    assert isinstance(config, ChatConfig)
    monkeypatch.setattr(model.chat, "config", config)
    assert read_jinja(write_jinja(model.chat), model.tokenizer) == config


def test_the_tiny_model_is_a_llava(call, tmp_path):
    assert call(export.main, TINY, "--out", tmp_path / "out").returncode == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "llava" and config["text_config"]["model_type"] == "qwen3"
    tiny, again = load_model(TINY), load_model(tmp_path / "out")
    messages = [Message("user", (IMAGE, "\n图中有什么？"))]
    sizes = [tiny.image_tokens(64, 64)]
    assert tiny.chat.encode(messages, sizes) == again.chat.encode(messages, sizes)
    for name, tensor in tiny.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
