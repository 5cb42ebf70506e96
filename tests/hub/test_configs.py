"""The `config.json` of each family: defaults are filled in, what is not implemented is refused."""

import math

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
        (QWEN2 | {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not implemented"),
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


# Of each family, the keys of a file that are numbers, beside those that say what it is.
NUMBERS = {
    "qwen2": ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
              "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
              "rope_theta", "max_position_embeddings"),
    "qwen": ("kv_channels", "layer_norm_epsilon", "seq_length", "rotary_emb_base",
             "intermediate_size"),
    "dinov2": ("hidden_size", "mlp_ratio", "patch_size", "image_size", "num_register_tokens",
               "layer_norm_eps", "num_channels", "interpolate_offset"),
    "siglip_vision_model": ("hidden_size", "intermediate_size", "image_size", "patch_size"),
    "qwen_vl_vision": ("width", "layers", "heads", "mlp_ratio", "patch_size", "output_dim",
                       "n_queries", "patch_positions"),
}  # fmt: skip
BAD = (math.nan, math.inf, -math.inf, -1, 2**62, 10**400, 1e308, 1e-320, True, "1", [1], {})


@pytest.mark.parametrize(("family", "keys"), NUMBERS.items(), ids=NUMBERS.keys())
def test_every_number_of_a_published_file_is_checked(family, keys):
    is_language = family in ("qwen2", "qwen")
    parse = parse_language_model_config if is_language else parse_vision_encoder_config
    for key in keys:
        for value in BAD:
            with pytest.raises(NanoVLMError, match=f"{key}|rope_theta|eps|head_dim|position"):
                parse({"model_type": family, "seq_length": 2048, key: value} if family == "qwen"
                      else {"model_type": family, key: value})  # fmt: skip


@pytest.mark.parametrize("key", ["factor", "low_freq_factor", "original_max_position_embeddings"])
@pytest.mark.parametrize("value", BAD)
def test_every_number_of_rotary_scaling_is_checked(key, value):
    with pytest.raises(NanoVLMError):
        parse_language_model_config(LLAMA | {"rope_scaling": LLAMA3 | {key: value}})


def test_null_is_as_good_as_absent():
    plain = parse_language_model_config(QWEN2)
    keys = ("rope_theta", "rope_scaling", "num_key_value_heads", "head_dim", "unknown_key")
    assert parse_language_model_config(QWEN2 | dict.fromkeys(keys)) == plain
    table = {"rope_type": None, "rope_theta": None, "factor": None}
    assert parse_language_model_config(QWEN2 | {"rope_scaling": table}) == plain


def test_a_whole_rotation_may_be_written_down():
    plain = parse_language_model_config(QWEN2)
    assert parse_language_model_config(QWEN2 | {"partial_rotary_factor": 1.0}) == plain


def test_keys_that_only_sign_a_file_are_passed_over():
    signed = {
        "unsloth_fixed": True,
        "unsloth_version": "2025.9.7",
        "some_tool_version": "1",
        "_commit_hash": "a",
        "license": "mit",
        "resid_pdrop": 0.0,
        "gradient_checkpointing": False,
        "attn_implementation": "sdpa",
    }
    assert parse_language_model_config(QWEN2 | signed) == parse_language_model_config(QWEN2)
    assert parse_vision_encoder_config(DINOV2 | signed) == parse_vision_encoder_config(DINOV2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llava", "vision_config": {}, "text_config": {}}, "a whole vision-lang"),
        ({"model_type": "qwen2_vl", "vision_config": {}}, "a whole vision-language model"),
        ({"model_type": "llava_llama", "mm_vision_tower": "openai/clip"}, "a whole vision-lang"),
        ({"model_type": "qwen", "visual": {"width": 1664}}, "a whole vision-language model; give"),
        ({"model_type": "nanovlm", "language_model": {}}, "trained here; give it as --init"),
        (QWEN2 | {"zzzzzzzz": 1}, "unknown key 'zzzzzzzz'; what it changes is not implemented"),
        ({"model_type": "siglip_vision_model"}, "a vision encoder; implemented are"),
        ({"_class_name": "UNet2DConditionModel"}, "part of a pipeline of diffusers"),
    ],
)
def test_a_config_of_another_kind_is_named(config, message):
    with pytest.raises(NanoVLMError, match=message):
        parse_language_model_config(config)
