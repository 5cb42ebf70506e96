"""Configs as published become the right shapes; what is not implemented is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovlm.errors import NanoVLMError
from nanovlm.hub.chat_configs import read_chat_config
from nanovlm.hub.image_configs import parse_image_config
from nanovlm.hub.models import load_model, read_model_config
from nanovlm.hub.published.families import OTHERS, PUBLISHED
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.memory.shapes import model_config
from nanovlm.model.language_model import LanguageModel
from nanovlm.model.projector import build_projector
from nanovlm.model.vision_encoder import VisionEncoder
from nanovlm.tokenizer import load_tokenizer
from nanovlm.training.settings import Settings
from tests.reference.published import llava_folder, smolvlm_folder
from tests.reference.published_configs import (
    LLAVA_7B,
    LLAVA_QWEN,
    SMOLVLM2_500M,
    SMOLVLM2_PROCESSOR,
    SMOLVLM_256M,
)


@pytest.mark.parametrize(
    ("config", "size", "bytes_each", "tokens"),
    [
        # The size of the published weights, and visual tokens of an image or tile.
        (SMOLVLM_256M, 513e6, 2, 64),
        (SMOLVLM2_500M, 2.03e9, 4, 64),
        (LLAVA_7B, 14.13e9, 2, 576),
        (LLAVA_QWEN, 1.73e9, 2, 729),
    ],
    ids=["smolvlm-256m", "smolvlm2-500m", "llava-1.5-7b", "llava-interleave-qwen-0.5b"],
)
def test_configs_as_published_give_models_of_the_published_size(config, size, bytes_each, tokens):
    parts = PUBLISHED[config["model_type"]].parse(config)
    vision, text = parts.vision_encoder, parts.language_model
    with torch.device("meta"):
        modules = [VisionEncoder(vision), LanguageModel(text)]
        modules.append(build_projector(parts.projector, vision.hidden_size, text.hidden_size))
    parameters = sum(it.numel() for module in modules for it in module.parameters())
    assert parameters * bytes_each == pytest.approx(size, rel=0.01)
    first = parts.vision_first_token
    side = vision.image_size
    shape = vision.feature_shape(side, side, parts.vision_layer, parts.vision_norm, first)
    assert modules[-1].num_tokens(shape[0]) == tokens


def test_omitted_settings_of_published_configs_take_the_references_defaults():
    parts = PUBLISHED["llava"].parse(LLAVA_7B)
    text, vision = parts.language_model, parts.vision_encoder
    assert (text.hidden_size, text.num_hidden_layers, text.intermediate_size) == (4096, 32, 11008)
    assert (text.rope_theta, text.num_key_value_heads, text.vocab_size) == (10000.0, 32, 32064)
    assert (vision.hidden_act, vision.layer_norm_eps) == ("quick_gelu", 1e-5)
    assert (parts.projector.bias, parts.vision_layer, parts.vision_first_token) == (True, -2, 1)
    parts = PUBLISHED["idefics3"].parse(SMOLVLM_256M)
    vision = parts.vision_encoder
    assert (vision.num_hidden_layers, vision.intermediate_size) == (12, 3072)
    assert (parts.projector.scale, parts.projector.bias) == (4, False)
    assert not parts.language_model.tie_word_embeddings


def test_image_processors_as_published():
    half = (0.5, 0.5, 0.5)
    expected = ImageConfig(512, 512, "tiles", None, "lanczos", half, half, max_tiles=4)
    assert parse_image_config(SMOLVLM2_PROCESSOR) == expected
    llava = {
        "crop_size": {"height": 336, "width": 336},
        "do_center_crop": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "processor_class": "LlavaProcessor",
        "resample": 3,
        "size": {"shortest_edge": 336},
    }
    config = parse_image_config(llava)
    assert (config.fit, config.height, config.shortest_edge) == ("crop", 336, 336)
    padded = llava | {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    with pytest.raises(NanoVLMError, match="do_pad = True is not implemented"):
        parse_image_config(padded)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    smolvlm_folder(root / "smolvlm")
    llava_folder(root / "llava")
    return {name: root / name for name in ("smolvlm", "llava")}


def changed(folder: Path, copy: Path, file: str = "config.json", **changes: Any) -> Path:
    """A copy of `folder` in which keys of one file are others; None takes a key out."""
    copy.mkdir(parents=True)
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path)
    content = json.loads((copy / file).read_text())
    for key, value in changes.items():
        content[key] = content.get(key, {}) | value if isinstance(value, dict) else value
        if value is None:
            del content[key]
    (copy / file).unlink()
    (copy / file).write_text(json.dumps(content))
    return copy


REFUSED = [
    ("llava", {"vision_feature_layer": [-2, -5]}, r"several layers .* = \[-2, -5\]\)"),
    ("llava", {"vision_feature_select_strategy": "cls"}, "strategy = 'cls' is not implemented"),
    ("llava", {"text_config": None}, "in LLaVA's first publisher's layout"),
    ("llava", {"vision_config": "clip"}, "vision_config is 'clip', expected a table"),
    ("llava", {"vision_config": None}, "vision_config is None, expected a table"),
    ("llava", {"image_grid_pinpoints": [[336, 672]]}, "unknown key 'image_grid_pinpoints'"),
    ("llava", {"projector_hidden_act": "relu6"}, "activation .*'relu6'"),
    ("llava", {"text_config": {"model_type": "gemma"}}, "text_config: model_type is 'gemma'"),
    ("llava", {"text_config": {"rope_scaling": {"type": "yarn"}, "rope_parameters": {}}},
     "text_config: rope_scaling: rope_type = 'yarn' is not"),
    ("llava", {"vision_config": {"model_type": "pixtral"}}, "vision_config: model_type is 'pix"),
    ("llava", {"image_token_index": 9}, "the image token of config.json has the id 9"),
    ("llava", {"quantization_config": {"quant_method": "awq"}}, "weights are quantised .'awq'."),
    ("llava", {"vision_feature_layer": -9}, "layer -9 of a vision transformer with 3 blocks"),
    ("smolvlm", {"text_config": {"use_resampler": True}}, "text_config: use_resampler = True is"),
    ("smolvlm", {"text_config": {"qk_layer_norms": True}}, "text_config: qk_layer_norms = True"),
    ("smolvlm", {"scale_factor": 3}, "is not made of 3×3 squares"),
    ("smolvlm", {"tie_word_embeddings": True}, "tied but stored with different values"),
    ("smolvlm", {"text_config": {"vocab_size": 400}}, "mis-shaped"),
    ("smolvlm", {"image_token_id": 128257}, "has the id 128257, which is no special token"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_settings_that_are_not_implemented_are_refused(folders, tmp_path, name, changes, message):
    folder = changed(folders[name], tmp_path / "copy", **changes)
    with pytest.raises(NanoVLMError, match=message) as caught:
        load_model(folder)
    assert len(caught.value.args) == 1 or "the tensors do not fit" in caught.value.args[0]


@pytest.mark.parametrize("model_type", OTHERS)
def test_relatives_are_named_in_one_line(folders, tmp_path, model_type):
    folder = changed(folders["llava"], tmp_path / "copy", model_type=model_type)
    with pytest.raises(NanoVLMError) as caught:
        load_model(folder)
    (line,) = caught.value.args
    assert line.startswith(f"{folder}: config.json: model_type is '{model_type}': ")
    assert OTHERS[model_type] in line and "smolvlm, idefics3, llava are read" in line


def test_any_other_models_folder_is_pointed_to_what_is_read(folders, tmp_path):
    folder = changed(folders["llava"], tmp_path / "copy", model_type="bert")
    with pytest.raises(NanoVLMError, match=r"'bert', a whole .* or of a published one \(smolvlm"):
        load_model(folder)


def test_images_that_are_prepared_in_another_way_are_refused(folders, tmp_path):
    folder = changed(
        folders["smolvlm"], tmp_path / "a", "preprocessor_config.json", do_image_splitting=False
    )
    with pytest.raises(NanoVLMError, match="do_image_splitting = False is not implemented"):
        load_model(folder)
    folder = changed(folders["llava"], tmp_path / "b")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(NanoVLMError, match="holds neither preprocessor_config.json nor a proc"):
        load_model(folder)


def test_another_chat_template_is_refused(folders, tmp_path):
    for number, (name, old, new) in enumerate(
        (
            ("smolvlm", "Assistant:' }}", "Answer:' }}"),
            ("smolvlm", "<end_of_utterance>\n", "<end_of_utterance>"),
            ("llava", "'<image>\n'", "'<image>'"),
        )
    ):
        template = json.loads((folders[name] / "chat_template.json").read_text())["chat_template"]
        assert template.count(old) == 1
        folder = changed(
            folders[name],
            tmp_path / str(number),
            "chat_template.json",
            chat_template=template.replace(old, new),
        )
        with pytest.raises(NanoVLMError, match="its chat template is another one"):
            load_model(folder)


def test_the_template_is_the_folders_or_its_familys(folders, tmp_path):
    for name, own, familys in (("smolvlm", "smolvlm", "smolvlm"), ("llava", "llava", "vicuna")):
        folder = changed(folders[name], tmp_path / name)
        assert read_model_config(folder).chat.template == own
        (folder / "chat_template.json").unlink()
        assert read_model_config(folder).chat.template == familys
    template = json.loads((folders["llava"] / "chat_template.json").read_text())["chat_template"]
    (folder / "chat_template.jinja").write_text(template + "\n")
    assert read_chat_config(folder, load_tokenizer(folder)).template == "llava"


def test_memory_is_predicted_from_the_folder_alone(folders, tmp_path):
    for name, folder in folders.items():
        copy = changed(folder, tmp_path / name)
        (copy / "model.safetensors").unlink()
        config = model_config(Settings(init=str(copy)))
        assert config == read_model_config(folder)
        assert config.language_model.hidden_size == 32
