"""Settings are read strictly: an unknown key or a value of another type is refused by name."""

import dataclasses
import math
from dataclasses import dataclass

import pytest

from nanovlm.errors import NanoVLMError
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.model.language_model import LanguageModelConfig
from nanovlm.model.lora import LoRAConfig
from nanovlm.model.projector import ProjectorConfig
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


# What damage, other tools and attackers write where a number belongs.
BAD_NUMBERS = (math.nan, math.inf, -math.inf, -1, -0.5, 2**62, 10**400, 1e308, 1e-320)
CONFIGS = (
    VisionEncoderConfig(),
    LanguageModelConfig(num_experts=4),
    ProjectorConfig(),
    ImageConfig(fit="tiles", max_tiles=2),
    ImageConfig(fit="crop", shortest_edge=256),
    LoRAConfig(8, 16.0, "q_proj"),
)


@pytest.mark.parametrize("part", CONFIGS, ids=lambda part: type(part).__name__)
def test_every_number_of_every_config_is_finite_and_bounded(part):
    written = dataclasses.asdict(part)
    numbers = [name for name, value in written.items() if type(value) in (int, float)]
    assert numbers
    for name in numbers:
        for value in (*BAD_NUMBERS, True, "1", [1], {}):
            with pytest.raises(NanoVLMError, match=f"{name} (is|=) ") as caught:
                from_dict(type(part), written | {name: value})
            assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["mean", "std"])
@pytest.mark.parametrize(
    "value",
    [[0.5], [0.5] * 4, [-1e30] * 3, [math.nan] * 3, [0.5, "0.5", 0.5], 0.5, None, [1e308] * 3],
)
def test_mean_and_standard_deviation_are_three_usable_numbers(name, value):
    with pytest.raises(NanoVLMError, match=f"{name} (is|=) "):
        from_dict(ImageConfig, {name: value})


def test_a_standard_deviation_is_not_nearly_zero():
    for value in (0, 0.0, 1e-320):
        with pytest.raises(NanoVLMError, match="std = "):
            from_dict(ImageConfig, {"std": [0.5, value, 0.5]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 1_000_000}, "num_experts is 1000000; it has to be at most 4096"),
        ({"num_experts": 4096, "num_hidden_layers": 1000}, "it has 4096000 experts in all"),
        ({"num_experts": 8, "experts_per_token": 1_000_000}, "experts_per_token is 1000000"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0; it has to be above 0"),
        ({"dropout": 1.0}, "dropout is 1.0; it has to be below 1"),
        ({"head_dim": 63}, "head_dim is 63; rotary positions need an even one"),
        (
            {"head_dim": 2, "rope_type": "dynamic_ntk", "original_max_position_embeddings": 9},
            "head_dim is 2; dynamic_ntk needs 4 or more",
        ),
    ],
)
def test_a_language_model_is_of_a_size_that_can_be_built(settings, message):
    with pytest.raises(NanoVLMError, match=message):
        LanguageModelConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 7, "patch_size": 14}, "image_size = 7 holds no patch of 14 pixels"),
        ({"num_queries": 4, "output_size": 8}, "a resampler .num_queries. reads patches alone"),
    ],
)
def test_a_vision_encoder_has_patches_that_its_parts_can_take(settings, message):
    with pytest.raises(NanoVLMError, match=message):
        VisionEncoderConfig(**settings)


def test_published_extremes_are_within_the_limits():
    LanguageModelConfig(
        vocab_size=262_144, hidden_size=16_384, intermediate_size=53_248, num_hidden_layers=126,
        num_attention_heads=128, num_key_value_heads=8, head_dim=128, rope_theta=3.58e9,
        max_position_embeddings=10_485_760, rms_norm_eps=1e-12,
    )  # fmt: skip


def test_values_in_messages_are_cut():
    with pytest.raises(NanoVLMError) as caught:
        from_dict(Toy, {"width": "x" * 100_000})
    assert len(str(caught.value)) < 300
    with pytest.raises(NanoVLMError) as caught:
        from_dict(Toy, {"w" * 100_000: 1})
    assert len(str(caught.value)) < 300


def test_optional_fields_and_lists_are_checked_too():
    for key, value in (("name", 3), ("mean", 3), ("mean", ["x"])):
        with pytest.raises(NanoVLMError, match=f"Toy: {key} is .*, expected"):
            from_dict(Toy, {"width": 3, key: value})
