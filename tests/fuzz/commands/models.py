"""Whole model folders, and adapters, that infer.py is given."""

import json
import tempfile
from functools import cache
from pathlib import Path
from random import Random

from nanovlm.hub.adapters import save_adapter
from nanovlm.hub.models import load_model
from nanovlm.model.lora import LoRAConfig, add_adapters
from tests.fuzz.commands.flags import read as run
from tests.fuzz.commands.toy import SCENE, SHIPPED
from tests.fuzz.damage import damaged_bytes, damaged_file, damaged_json, to_json
from tests.fuzz.inputs import Content, FaultError, Input, Kind

ASKED = ("infer", "a.png", "描述图片", "--max-new-tokens", "2", "--device", "cpu")
# Where a folder lies that is not quite the one to give.
PLACES = ("model/snapshots/0a1b/", "model/model/", "model/checkpoints/step_1/")
MORE = {
    "generation_config.json": {"eos_token_id": [3, 5], "temperature": 0.7, "do_sample": True},
    "tokenizer_config.json": {"chat_template": "{{ messages }}", "eos_token": "</s>"},
    "quantize_config.json": {"bits": 4},
}
ZEROS = bytes(100_000)


@cache
def _model() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(SHIPPED).iterdir()}


@cache
def _adapter() -> dict[str, bytes]:
    """An adapter of rank 2 for the shipped model."""
    model = load_model(SHIPPED).requires_grad_(False)
    config = LoRAConfig(rank=2, alpha=4, targets="*_proj")
    add_adapters(model.language_model, config)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, Path(folder), config)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def make(rng: Random) -> Input:
    """The shipped model, with an adapter or without, and one file damaged, moved or added."""
    model: dict[str, Content] = {f"model/{name}": data for name, data in _model().items()}
    adapter: dict[str, Content] = {f"adapter/{name}": data for name, data in _adapter().items()}
    arguments = [*ASKED, "--model", "model"]
    what = rng.randrange(6)
    if what == 0:
        model["model/config.json"] = damaged_json(rng, json.loads(_model()["config.json"]))
    elif what == 1:
        model["model/model.safetensors"] = damaged_weights(rng, _model()["model.safetensors"])
    elif what == 2:
        del model[rng.choice(list(model))]
    elif what == 3:
        place = rng.choice(PLACES)
        model = {name.replace("model/", place, 1): data for name, data in model.items()}
    elif what == 4:
        name = rng.choice(list(MORE))
        model[f"model/{name}"] = rng.choice((to_json(MORE[name]), damaged_json(rng, MORE[name])))
    else:
        arguments += ["--adapter", "adapter"]
        spoiled = rng.choice(list(adapter))
        data = adapter[spoiled]
        assert isinstance(data, bytes)
        if spoiled.endswith(".json"):
            adapter[spoiled] = damaged_json(rng, json.loads(data))
        else:
            adapter[spoiled] = damaged_weights(rng, data)
    files = model | (adapter if "--adapter" in arguments else {})
    files["a.png"] = SCENE
    return Input(files, tuple(arguments))


def damaged_weights(rng: Random, data: bytes) -> Content:
    """Weights whose header is damaged, or whose end never arrived."""
    half = data[: rng.randrange(len(data) // 4, len(data) // 2)]

    def structured() -> bytes:
        damaged = damaged_bytes(rng, data[:3000]) + data[3000:]
        return rng.choice((damaged, half, half + bytes(len(data) - len(half))))

    return damaged_file(rng, data, structured)


def read(input: Input) -> None:
    """Ask the model; the end of its weights has to be there."""
    run(input)
    for name, content in input.files.items():
        if isinstance(content, bytes) and content.endswith(ZEROS):
            raise FaultError(f"{Path(name).name} is read although it ends in zeros")


KIND = Kind("models", make, read, short=6, long=300)
