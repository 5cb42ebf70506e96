"""What was saved under the names of before version 0.2 is refused in one line with the new name."""

import json
import re
from pathlib import Path

import pytest

from nanovlm.errors import NanoVLMError
from nanovlm.hub.adapters import ADAPTER_FILE, load_adapter, save_adapter
from nanovlm.hub.loading import open_checkpoint
from nanovlm.hub.models import load_language_model, load_model, save_model
from nanovlm.hub.names import refuse_old_names
from nanovlm.hub.safetensors import save_file
from nanovlm.model.lora import LoRAConfig, add_adapters
from nanovlm.model.vlm import VisionLanguageModel

NEW_NAMES = {"vision_encoder": "vision", "language_model": "text"}  # keys of a config.json


@pytest.fixture
def model(tiny) -> VisionLanguageModel:
    return load_model(tiny.model)


def change_config(folder: Path, change) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def rename_tensors(path: Path, new: str, old: str) -> None:
    stored = open_checkpoint(path)
    names = [name for name in stored.keys() if name.startswith(new)]
    assert names
    tensors = {name: stored.tensor(name).clone() for name in stored.keys()}
    tensors |= {name.replace(new, old, 1): tensors.pop(name) for name in names}
    save_file(tensors, path)


def refusal(load, *arguments) -> str:
    with pytest.raises(NanoVLMError) as caught:
        load(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("new", NEW_NAMES)
def test_a_config_with_old_keys(model, tmp_path, new):
    save_model(model, tmp_path)
    old = NEW_NAMES[new]
    change_config(
        tmp_path, lambda config: {old if key == new else key: config[key] for key in config}
    )
    assert refusal(load_model, tmp_path) == (
        f"{tmp_path}: config.json: key {old!r} is now {new!r}; rename it"
    )


@pytest.mark.parametrize(
    "new, old", [("vision_encoder.", "vision."), ("language_model.", "decoder.")]
)
def test_a_model_with_old_tensors(model, tmp_path, new, old):
    save_model(model, tmp_path)
    path = tmp_path / "model.safetensors"
    rename_tensors(path, new, old)
    assert re.fullmatch(
        rf"{re.escape(str(path))}: tensor '{old}(\S+)' is now '{new}\1'; the file was saved before "
        "version 0.2: rename its tensors, or train again",
        refusal(load_model, tmp_path),
    )


def test_an_adapter_with_old_tensors(model, tiny, tmp_path):
    config = LoRAConfig(2, 4.0, "q_proj")
    add_adapters(model.language_model, config)
    save_adapter(model, tmp_path, config)
    rename_tensors(tmp_path / ADAPTER_FILE, "language_model.", "decoder.")
    message = refusal(load_adapter, load_model(tiny.model), tmp_path)
    assert message.startswith(f"{tmp_path / ADAPTER_FILE}: tensor 'decoder.blocks.")
    assert "is now 'language_model.blocks." in message and "before version 0.2" in message


def test_a_language_model_of_ours_with_its_old_type(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nanovlm_decoder"}))
    assert refusal(load_language_model, tmp_path) == (
        f"{tmp_path}: config.json: model_type 'nanovlm_decoder' is now 'nanovlm_language_model'; "
        "rename it"
    )


def test_new_names_pass(model):
    refuse_old_names(model.state_dict(), "here")
    refuse_old_names(["vision_model.decoder.weight", "visions.weight"], "here")
