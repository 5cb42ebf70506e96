"""Settings are read strictly: an unknown key or a value of another type is refused by name."""

import dataclasses
from dataclasses import dataclass

import pytest

from nanovlm.errors import NanoVLMError
from nanovlm.model.language_model import LanguageModelConfig
from nanovlm.model.vision_encoder import VisionEncoderConfig
from nanovlm.utils.config import from_dict


@dataclass(frozen=True)
class Toy:
    width: int
    ratio: float = 1.0
    gated: bool = False
    name: str | None = None
    mean: tuple[float, ...] = (0.0,)


def test_from_dict_fills_defaults_and_turns_lists_into_tuples():
    assert from_dict(Toy, {"width": 3}) == Toy(3)
    given = {"width": 3, "ratio": 2, "mean": [1, 2], "name": None}
    assert from_dict(Toy, given) == Toy(3, 2, mean=(1, 2))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"widht": 3}, "Toy: unknown key 'widht'; did you mean 'width'?"),
        ({"width": 3, "zzz": 1}, "Toy: unknown key 'zzz'; remove it"),
        ({"ratio": 2.0}, "Toy: key 'width' is missing"),
        ({"width": "3"}, "Toy: width is '3', expected a whole number"),
        ({"width": 3.0}, "Toy: width is 3.0, expected a whole number"),
        ({"width": True}, "Toy: width is True, expected a whole number"),
        ({"width": 3, "gated": 1}, "Toy: gated is 1, expected true or false"),
        ({"width": 3, "ratio": True}, "Toy: ratio is True, expected a number"),
        ([3], "Toy: expected a table of settings, found list"),
    ],
)
def test_from_dict_names_what_is_wrong(config, message):
    with pytest.raises(NanoVLMError) as caught:
        from_dict(Toy, config)
    assert str(caught.value) == message


def test_where_names_the_file():
    with pytest.raises(NanoVLMError, match="^settings.toml: unknown key 'x'"):
        from_dict(Toy, {"x": 1}, "settings.toml")


@pytest.mark.parametrize(
    "part", [VisionEncoderConfig(), LanguageModelConfig()], ids=["vision_encoder", "language_model"]
)
def test_our_own_configs_survive_a_round_trip(part):
    written = dataclasses.asdict(part)
    assert from_dict(type(part), written) == part
    message = "unknown key 'hidden_sise'; did you mean 'hidden_size'?"
    with pytest.raises(NanoVLMError, match=message):
        from_dict(type(part), written | {"hidden_sise": 1})


def test_a_model_folder_with_unknown_rotary_scaling_is_refused():
    message = "rope_type is 'yarn'; take one of default, llama3, dynamic_ntk"
    with pytest.raises(NanoVLMError, match=message):
        from_dict(LanguageModelConfig, {"rope_type": "yarn"})
