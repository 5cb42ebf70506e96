"""Hub folders of a vision encoder and of a language model, joined and trained for a step."""

import json
from functools import cache
from random import Random

from nanovlm.hub.toy import ASSETS
from tests.fuzz.commands.flags import read
from tests.fuzz.commands.models import damaged_weights
from tests.fuzz.commands.toy import FLAGS, arguments_of, scenes
from tests.fuzz.commands.training import check
from tests.fuzz.damage import damaged_bytes, damaged_file, damaged_json, to_json
from tests.fuzz.inputs import Content, Input, Kind

PARTS = ("tiny-vision-encoder", "tiny-language-model")
# Files that published folders have besides, or that tell what a folder is.
MORE = {
    "tiny-language-model/generation_config.json": {"eos_token_id": [1, 2], "temperature": 0.7},
    "tiny-language-model/tokenizer_config.json": {"eos_token": "</s>", "chat_template": ""},
    "tiny-language-model/special_tokens_map.json": {"pad_token": {"content": "<pad>"}},
    "tiny-vision-encoder/processor_config.json": {"image_processor": {"do_resize": True}},
}


@cache
def _files() -> dict[str, bytes]:
    paths = [path for part in PARTS for path in (ASSETS / part).iterdir()]
    return {path.relative_to(ASSETS).as_posix(): path.read_bytes() for path in paths}


def make(rng: Random) -> Input:
    """The parts that ship, of which one file is damaged, missing or added."""
    files: dict[str, Content] = dict(_files())
    name = rng.choice([name for name in files if rng.random() < 0.5 or name.endswith(".json")])
    what, data = rng.randrange(8), _files()[name]
    if what == 0:
        del files[name]
    elif what == 1:
        name = rng.choice(list(MORE))
        files[name] = rng.choice((to_json(MORE[name]), damaged_json(rng, MORE[name])))
    elif name.endswith(".json"):
        files[name] = damaged_json(rng, json.loads(data))
    elif name.endswith(".safetensors"):
        files[name] = damaged_weights(rng, data)
    else:
        files[name] = damaged_file(rng, data, lambda: damaged_bytes(rng, data))
    flags = {**FLAGS, "max-steps": "1", "vision-encoder": PARTS[0], "language-model": PARTS[1]}
    if rng.random() < 0.2:
        flags["language-model"], flags["vision-encoder"] = rng.choice((PARTS, PARTS[:1] * 2))
    shape = "tiny-language-model/config.json"  # whose sizes new weights are made of
    if rng.random() < 0.2 and files.get(shape) == _files()[shape]:
        flags["language-model-shape"] = "tiny-language-model"
    del flags["init"]
    return Input({**files, **scenes()}, ("train_stage1", *arguments_of(flags)))


KIND = Kind("parts", make, read, short=2, long=250, check=check)
