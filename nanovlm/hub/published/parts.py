"""What the files of the families share: the parts of a whole model, and its tables of settings."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from nanovlm.errors import NanoVLMError, quoted
from nanovlm.hub.config_json import parse_hub_config
from nanovlm.model.language_model import LanguageModelConfig
from nanovlm.model.projector import ProjectorConfig
from nanovlm.model.vision_encoder import VisionEncoderConfig

T = TypeVar("T")
_TABLES = ("vision_config", "text_config")


@dataclass(frozen=True)
class Parts:
    """What a published `config.json` says: the shapes of `VLMConfig` and how they are joined.

    `vision_type` and `language_type` are keys of VISION_FAMILIES and LANGUAGE_FAMILIES.
    """

    vision_type: str
    vision_encoder: VisionEncoderConfig
    language_type: str
    language_model: LanguageModelConfig
    projector: ProjectorConfig
    image_token_id: int
    vision_layer: int = -1
    vision_norm: bool = True
    vision_first_token: int | None = None


def read_table(
    config: Mapping[str, Any], defaults: Mapping[str, Any], ignored: Iterable[str]
) -> dict[str, Any]:
    """A whole model's own settings, read as strictly as those of a part (`parse_hub_config`)."""
    own = {key: value for key, value in config.items() if key not in _TABLES}
    return parse_hub_config(own, [str(config.get("model_type"))], defaults, ignored)


def table_of(config: Mapping[str, Any], key: str, model_type: str) -> dict[str, Any]:
    """One part's settings in a whole model's `config.json`; `model_type` where it gives none."""
    table = config.get(key)
    if not isinstance(table, Mapping):
        raise NanoVLMError(f"config.json: {key} is {quoted(table)}, expected a table of settings")
    return {"model_type": model_type, **table}


def parse_part(parse: Callable[[dict[str, Any]], T], table: dict[str, Any], key: str) -> T:
    """What `parse` makes of a part's table; an error names the table."""
    try:
        return parse(table)
    except NanoVLMError as error:
        message = str(error).replace("config.json: ", f"config.json: {key}: ", 1)
        raise NanoVLMError(message) from None
