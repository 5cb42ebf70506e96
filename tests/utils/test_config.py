"""Settings are read strictly: an unknown key or an unimplemented value is refused by name."""

import dataclasses
from dataclasses import dataclass

import pytest
from transformers import (
    Dinov2Config,
    Dinov2WithRegistersConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from nanovlm.errors import NanoVLMError
from nanovlm.hub.language_configs import parse_language_model_config
from nanovlm.hub.vision_configs import parse_vision_encoder_config
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


QWEN2, QWEN3, DINOV2 = {"model_type": "qwen2"}, {"model_type": "qwen3"}, {"model_type": "dinov2"}
LLAMA, MISTRAL = {"model_type": "llama"}, {"model_type": "mistral", "sliding_window": None}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "config, message",
    [
        (
            QWEN2 | {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_scaling: rope_type = 'yarn' is not implemented",
        ),
        (
            QWEN3 | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
            "rope_parameters: rope_type = 'yarn' is not implemented, only 'default'",
        ),
        (
            QWEN2 | {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor = 0.5 is not implemented",
        ),
        (
            QWEN2 | {"rope_parameters": {"rope_tetha": 1e6}},
            "unknown key 'rope_tetha'; did you mean 'rope_theta'",
        ),
        (
            QWEN2 | {"rope_parameters": [1e6]},
            "rope_parameters is .1000000.0., expected a value such as {}",
        ),
        (
            QWEN2 | {"rope_parameters": {"rope_theta": "1e6"}},
            "rope_theta is '1e6', expected a number",
        ),
        (
            QWEN2 | {"hidden_size": "896"},
            "config.json: hidden_size is '896', expected a value such as 4096",
        ),
        (
            QWEN2 | {"intermediate_size": 896.5},
            "intermediate_size is 896.5, expected a whole number",
        ),
        (
            QWEN2 | {"tie_word_embeddings": 1},
            "tie_word_embeddings is 1, expected a value such as False",
        ),
        (QWEN2 | {"num_attention_heads": 0}, "num_attention_heads is 0; it has to be above 0"),
        (
            QWEN2 | {"num_attention_heads": 14, "num_key_value_heads": 4},
            "num_attention_heads = 14 is not a multiple of num_key_value_heads = 4",
        ),
        (QWEN2 | {"num_hidden_layers": -1}, "num_hidden_layers is -1; it has to be above 0"),
        (
            QWEN2 | {"num_hidden_layers": 10**12},
            "num_hidden_layers is 1000000000000; it has to be at most 1000",
        ),
        (QWEN2 | {"head_dim": "64"}, "head_dim is '64', expected a whole number"),
        (QWEN2 | {"layer_types": 3}, "layer_types is 3, expected a value such as"),
        (QWEN2 | {"use_sliding_window": True}, "use_sliding_window = True is not implemented"),
        (
            QWEN2 | {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types = .*sliding_attention",
        ),
        (QWEN2 | {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not implemented, only 'silu'"),
        (QWEN3 | {"attention_bias": True}, "attention_bias = True is not implemented"),
        (
            LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
            "rope_scaling: rope_type = 'linear' is not implemented, only 'default' and 'llama3'",
        ),
        (
            LLAMA | {"rope_scaling": LLAMA3 | {"atention_factor": 1.0}},
            "rope_scaling: unknown key 'atention_factor'",
        ),
        (
            LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling: key 'low_freq_factor' is missing",
        ),
        (
            LLAMA | {"rope_scaling": LLAMA3 | {"factor": "8"}},
            "rope_factor is '8', expected a number",
        ),
        (
            LLAMA | {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
            "rope_high_freq_factor = 1.0 is not above",
        ),
        (
            LLAMA | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 0}},
            "needs original_max_position_embeddings",
        ),
        (LLAMA | {"rope_interleaved": True}, "rope_interleaved = True is not implemented"),
        (MISTRAL | {"sliding_window": 4096}, "sliding_window = 4096 is not implemented, only null"),
        ({"model_type": "mistral"}, "sliding_window = 4096 is not implemented, only null"),
        (MISTRAL | {"attention_bias": True}, "attention_bias = True is not implemented"),
        (
            QWEN2 | {"num_hiden_layers": 3},
            "unknown key 'num_hiden_layers'; did you mean 'num_hidden_layers'?",
        ),
        (
            {"model_type": "qwen3_moe"},
            "model_type is 'qwen3_moe'; implemented are qwen, qwen2, qwen3, llama, mistral",
        ),
        ({}, "model_type is None"),
    ],
)
def test_a_language_model_that_is_not_implemented_is_refused(config, message):
    with pytest.raises(NanoVLMError, match=message):
        parse_language_model_config(config)


@pytest.mark.parametrize(
    "config, message",
    [
        (DINOV2 | {"hidden_act": "relu"}, "hidden_act = 'relu' is not implemented, only 'gelu'"),
        (DINOV2 | {"num_channels": 1}, "num_channels = 1"),
        (DINOV2 | {"hidden_size": "384"}, "hidden_size is '384', expected a value such as 768"),
        (
            DINOV2 | {"image_size": [224, 224]},
            "image_size is .224, 224., expected a value such as 224",
        ),
        (DINOV2 | {"patch_size": 0}, "patch_size is 0; it has to be above 0"),
        (
            DINOV2 | {"hidden_size": 100},
            "hidden_size = 100 is not a multiple of num_attention_heads = 12",
        ),
        (DINOV2 | {"qkv_bias": False}, "qkv_bias = False"),
        (
            DINOV2 | {"interpolate_antialias": True},
            "interpolate_antialias = True is not implemented, only False",
        ),
        (
            {"model_type": "dinov2_with_registers", "interpolate_offset": 0.1},
            "interpolate_offset = 0.1 is not implemented",
        ),
        (DINOV2 | {"patch_sizes": 16}, "unknown key 'patch_sizes'; did you mean 'patch_size'?"),
        (
            {"model_type": "vit"},
            "model_type is 'vit'; implemented are dinov2, dinov2_with_registers",
        ),
    ],
)
def test_a_vision_encoder_that_is_not_implemented_is_refused(config, message):
    with pytest.raises(NanoVLMError, match=message):
        parse_vision_encoder_config(config)


def test_null_counts_as_left_out():
    null = dict.fromkeys(
        ("head_dim", "num_key_value_heads", "rope_parameters", "rope_theta", "layer_types")
    )
    assert parse_language_model_config(QWEN2 | null) == parse_language_model_config(QWEN2)


def test_a_dinov2_saved_by_an_older_library():
    older = {"_out_features": ["stage12"], "_out_indices": [12], "stage_names": ["stem", "stage12"]}
    assert parse_vision_encoder_config(DINOV2 | older) == parse_vision_encoder_config(DINOV2)


def test_what_hub_files_leave_out_is_the_reference_default():
    parse = parse_language_model_config
    for config in (Qwen2Config(), Qwen3Config(), LlamaConfig()):
        assert parse({"model_type": config.model_type}) == parse(config.to_dict())
    assert parse(MISTRAL) == parse(MistralConfig(sliding_window=None).to_dict())
    parse = parse_vision_encoder_config
    for config in (Dinov2Config(), Dinov2WithRegistersConfig()):
        assert parse({"model_type": config.model_type}) == parse(config.to_dict())


@pytest.mark.parametrize(
    "width, layers, num_heads, swiglu, intermediate_size",
    [
        (384, 12, 6, False, 1536),
        (768, 12, 12, False, 3072),
        (1024, 24, 16, False, 4096),
        (1536, 40, 24, True, 4096),
    ],
)
def test_the_published_dinov2_sizes(width, layers, num_heads, swiglu, intermediate_size):
    config = parse_vision_encoder_config(
        {
            "model_type": "dinov2",
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": num_heads,
            "use_swiglu_ffn": swiglu,
            "image_size": 518,
            "patch_size": 14,
            "mlp_ratio": 4,
        }
    )
    assert config.intermediate_size == intermediate_size


def test_the_published_dinov2_with_registers():
    config = parse_vision_encoder_config(
        {
            "apply_layernorm": True,
            "architectures": ["Dinov2WithRegistersModel"],
            "attention_probs_dropout_prob": 0.0,
            "drop_path_rate": 0.0,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.0,
            "hidden_size": 768,
            "image_size": 518,
            "initializer_range": 0.02,
            "interpolate_antialias": True,
            "interpolate_offset": 0.0,
            "layer_norm_eps": 1e-06,
            "layerscale_value": 1.0,
            "mlp_ratio": 4,
            "model_type": "dinov2_with_registers",
            "num_attention_heads": 12,
            "num_channels": 3,
            "num_hidden_layers": 12,
            "num_register_tokens": 4,
            "out_features": ["stage12"],
            "out_indices": [12],
            "patch_size": 14,
            "qkv_bias": True,
            "reshape_hidden_states": True,
            "stage_names": ["stem", "stage1", "stage12"],
            "torch_dtype": "float32",
            "use_swiglu_ffn": False,
        }
    )
    assert config == VisionEncoderConfig(num_register_tokens=4, position_antialias=True)


@pytest.mark.parametrize(
    "part", [VisionEncoderConfig(), LanguageModelConfig()], ids=["vision_encoder", "language_model"]
)
def test_our_own_configs_survive_a_round_trip(part):
    written = dataclasses.asdict(part)
    assert from_dict(type(part), written) == part
    with pytest.raises(
        NanoVLMError, match="unknown key 'hidden_sise'; did you mean 'hidden_size'?"
    ):
        from_dict(type(part), written | {"hidden_sise": 1})


def test_a_model_folder_with_unknown_rotary_scaling_is_refused():
    with pytest.raises(
        NanoVLMError,
        match="rope_type is 'yarn'; take one of default, llama3, dynamic_ntk",
    ):
        from_dict(LanguageModelConfig, {"rope_type": "yarn"})


def test_the_published_smollm2():
    config = parse_language_model_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 576,
            "initializer_range": 0.041666666666666664,
            "intermediate_size": 1536,
            "is_llama_config": True,
            "max_position_embeddings": 8192,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "pad_token_id": 2,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers.js_config": {"kv_cache_dtype": "float16"},
            "transformers_version": "4.42.3",
            "use_cache": True,
            "vocab_size": 49152,
        }
    )
    assert config == LanguageModelConfig(
        49152,
        576,
        1536,
        30,
        9,
        3,
        64,
        qkv_bias=False,
        rms_norm_eps=1e-5,
        rope_theta=100000,
        max_position_embeddings=8192,
    )
