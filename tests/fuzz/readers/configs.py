"""The JSON files that describe a model: of every family, and our own."""

import dataclasses
import json
from pathlib import Path
from random import Random
from typing import Any

import torch

from nanovlm.errors import NanoVLMError
from nanovlm.hub.config_json import read_config
from nanovlm.hub.image_configs import parse_image_config, read_processor
from nanovlm.hub.language_configs import parse_language_model_config
from nanovlm.hub.models import parse_model_config
from nanovlm.hub.published.families import PUBLISHED
from nanovlm.hub.published.parts import Parts
from nanovlm.hub.shapes import LANGUAGE_MODELS, VISION_ENCODERS
from nanovlm.hub.toy import ASSETS
from nanovlm.hub.vision_configs import parse_vision_encoder_config
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.model.language_model import LanguageModel
from nanovlm.model.vision_encoder import VisionEncoder
from tests.fuzz.damage import damaged_json, rewritten, to_json
from tests.fuzz.inputs import FaultError, Input, Kind
from tests.reference.published_configs import LLAVA_7B, LLAVA_QWEN, SMOLVLM2_500M, SMOLVLM_256M

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
SMALLEST, LARGEST = 1e-30, 2**63 - 1  # the latter is the largest seed
VISION = [published.config for published in VISION_ENCODERS.values()]
LANGUAGE = [published.config for published in LANGUAGE_MODELS.values()]
# Keys that published files have besides the shape.
MORE = {
    "architectures": ["Model"], "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
    "initializer_range": 0.02, "use_cache": True, "bos_token_id": 1, "eos_token_id": [2, 3],
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def make(rng: Random) -> Input:
    """A damaged config of a vision encoder, a language model, a whole model or a processor."""
    what = rng.choice(("vision", "language", "language", "model", "published", "processor"))
    if what == "processor":
        value = rng.choice([published.processor for published in VISION_ENCODERS.values()])
    elif what == "model":
        value = json.loads((ASSETS / "tiny-vlm" / CONFIG).read_text())
    elif what == "published":
        value = rng.choice((SMOLVLM_256M, SMOLVLM2_500M, LLAVA_7B, LLAVA_QWEN))
    elif what == "vision":
        value = rng.choice(VISION)
        if rng.random() < 0.2:
            value = {"model_type": "siglip", "vision_config": SMALL, "text_config": {}}
    else:
        value = rng.choice(LANGUAGE) | rng.choice(({}, SMALL, MORE, {"rope_scaling": LLAMA3}))
        if value["model_type"] == "llama" and rng.random() < 0.3:
            value = value | {"model_type": "mistral", "sliding_window": None}
    name = PROCESSOR if what == "processor" else CONFIG
    content = damaged_json(rng, value)
    if rng.random() < 0.1:
        content = rewritten(rng, to_json(value))
    return Input({name: content}, (what,))


def read(input: Input) -> None:
    """Parse the file and build the model without its weights; all its numbers are usable."""
    folder, (what,) = Path(), input.arguments
    if what == "processor":
        processor = read_processor(folder)
        config: Any = ImageConfig() if processor is None else parse_image_config(processor)
    else:
        parse = {
            "vision": parse_vision_encoder_config,
            "language": parse_language_model_config,
            "model": parse_model_config,
            "published": _parse_published,
        }[what]
        _, config = read_config(folder, parse)
    check_numbers(dataclasses.asdict(config))
    if what in ("vision", "language"):
        with torch.device("meta"):
            (VisionEncoder if what == "vision" else LanguageModel)(config)


def _parse_published(config: dict[str, Any]) -> Parts:
    family = PUBLISHED.get(str(config.get("model_type")))
    if family is None:
        raise NanoVLMError("another model's")
    return family.parse(config)


def check_numbers(value: Any, name: str = "") -> None:
    """Raise FaultError for a number, at any depth, that no config or flag can mean."""
    if isinstance(value, dict):
        for key, item in value.items():
            check_numbers(item, f"{name}.{key}" if name else key)
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_numbers(item, name)
    elif isinstance(value, (int, float)) and not (
        value == 0 or SMALLEST < abs(value) <= LARGEST  # which NaN is not
    ):
        raise FaultError(f"{name} is accepted though it is {value:.0e}")


KIND = Kind("configs", make, read, short=60, long=1700)
