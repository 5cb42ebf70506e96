"""What is given in place of a model's folder is named, and what to give instead."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nanovlm.errors import NanoVLMError
from nanovlm.hub.models import load_language_model, load_model, load_vision_encoder
from nanovlm.tokenizer import load_tokenizer

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 988097824\n"
QWEN2 = {"model_type": "qwen2"}


def files(**contents: str | dict) -> Callable[[Path], None]:
    """Writes files with these names, in which `__` stands for a dot and `_in_` for a slash."""

    def write(folder: Path) -> None:
        for name, content in contents.items():
            path = folder / name.replace("_in_", "/").replace("__", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content))

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (files(), "is an empty folder"),
        (files(settings__toml="", model_in_config__json="{}"), "the folder of a run; .*model$"),
        (files(settings__toml=""), "the folder of a run that has not ended"),
        (files(snapshots_in_abc_in_config__json="{}"), "root of a cache of the hub; .*/abc$"),
        (None, "a cache of the hub with many models"),
        (files(adapter_config__json="{}"), "an adapter folder of PEFT"),
        (files(adapter__json="{}"), "this folder as --adapter"),
        (files(model_index__json="{}"), "a pipeline of diffusers"),
        (files(modules__json="[]"), "a model of sentence-transformers"),
        (files(model__gguf="GGUF"), "holds a GGUF file"),
        (files(params__json="{}", consolidated__00__pth=""), "first publisher's layout"),
        (files(README="x"), "holds no config.json; is it the right folder"),
        (files(text_in_config__json="{}"), "holds no config.json; give .*/text$"),
        (files(config__json=LFS), "config.json: is not JSON but a Git LFS pointer"),
        (files(config__json="<!DOCTYPE html><html>"), "config.json: is not JSON but an HTML page"),
        (files(config__json=QWEN2 | {"quantization_config": {"quant_method": "gptq"}}),
         "its weights are quantised .'gptq'., which is not read; take the folder with the full"),
        (files(config__json=QWEN2 | {"quantization": {"bits": 4}}), "its weights are quantised"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
@pytest.mark.parametrize("load", [load_model, load_language_model, load_vision_encoder])
def test_a_folder_of_another_kind_is_named(tmp_path, load, write, message):
    if write is None:
        (tmp_path / "models--a--b").mkdir()
    else:
        write(tmp_path)
    with pytest.raises(NanoVLMError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value) and "unknown key" not in str(caught.value)


def test_a_link_to_a_file_that_is_gone_is_named(tmp_path):
    (tmp_path / "config.json").symlink_to("../../blobs/absent")
    with pytest.raises(NanoVLMError, match="config.json is a link to a file that is gone"):
        load_language_model(tmp_path)


def test_shards_without_their_index_are_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN2))
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(NanoVLMError, match="but model-00001-of-00002.safetensors; fetch the index"):
        load_language_model(tmp_path)


def test_a_file_or_nothing_in_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(NanoVLMError, match="is a GGUF file .llama.cpp., not a folder; give"):
        load_language_model(tmp_path / "model.gguf")
    with pytest.raises(NanoVLMError, match="there is no such folder"):
        load_language_model(tmp_path / "absent")


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "qwen.tiktoken",
     "tokenizer_config.json"],
)  # fmt: skip
def test_a_pointer_in_place_of_any_file_of_a_tokenizer_is_named(tmp_path, name):
    for other in ("vocab.json", "merges.txt") if name in ("vocab.json", "merges.txt") else ():
        (tmp_path / other).write_text("{}" if other == "vocab.json" else "")
    (tmp_path / name).write_text(LFS)
    if name == "tokenizer_config.json":
        (tmp_path / "tokenizer.model").write_text(LFS)
    with pytest.raises(
        NanoVLMError, match=f"{name.replace('_config.json', '')}.* a Git LFS pointer"
    ):
        load_tokenizer(tmp_path)
