"""The `config.json` of every family of vision encoders → `VisionEncoderConfig`."""

import math
from collections.abc import Mapping
from typing import Any

from nanovlm.errors import NanoVLMError
from nanovlm.hub.config_json import read_hf_config, require
from nanovlm.hub.families import VISION_FAMILIES
from nanovlm.model.vision_encoder import VisionEncoderConfig
from nanovlm.utils.config import from_dict

# What the hub files of a family leave out (the reference's defaults), then what all of its models
# have in common.
_VIT = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_channels=3,
    image_size=224,
)


_SIGLIP = _VIT | dict(patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)


_CLIP = _VIT | dict(patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5)


_SMOLVLM = _SIGLIP | dict(hidden_size=1152, num_attention_heads=16, patch_size=32)


_PATCHES_ONLY = dict(class_token=False, layer_scale=False)


_TOWERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "siglip_vision_model": (_SIGLIP, _PATCHES_ONLY),
    "clip_vision_model": (
        _CLIP,
        dict(layer_scale=False, patch_bias=False, embedding_norm=True, final_norm=False),
    ),
    "smolvlm_vision": (_SMOLVLM, _PATCHES_ONLY | dict(position_resize="nearest")),
    "idefics3_vision": (_SMOLVLM, _PATCHES_ONLY | dict(position_resize="nearest")),
}


# Whole models, in whose file the tower's settings are a table, `vision_config`; its own model_type
# is often the model's.
_WHOLE = {
    "siglip": "siglip_vision_model",
    "clip": "clip_vision_model",
    "smolvlm": "smolvlm_vision",
    "idefics3": "idefics3_vision",
}


# Of the training, of the parts behind the tower, and of how images are cut into tiles.
_UNUSED = (
    "attention_dropout",
    "dropout",
    "initializer_factor",
    "projection_dim",
    "vision_use_head",
    "vocab_size",
    "use_base_siglip",
    "max_image_size",
    "size",
    "tie_word_embeddings",
)


def parse_vision_encoder_config(config: dict) -> VisionEncoderConfig:
    """Read the `config.json` of a hub folder: of a tower, or of a whole SigLIP, CLIP, SmolVLM or
    Idefics3. Hub files leave out what equals the reference's defaults. "qwen_vl_vision" is what
    `extract_vision.py` calls Qwen-VL's tower."""
    model_type = str(config.get("model_type"))
    if model_type in ("dinov2", "dinov2_with_registers"):
        return _parse_dinov2(config)
    if model_type == "qwen_vl_vision":
        return _parse_qwen_vl(config)
    if model_type in ("siglip2", "siglip2_vision_model"):
        raise NanoVLMError(
            f"config.json: model_type is {model_type!r}, which reads images of any shape (NaFlex) and is "
            "not implemented; take a SigLIP 2 of a fixed size, such as siglip2-base-patch16-256"
        )
    if model_type in _WHOLE:
        config = _vision_part(config, _WHOLE[model_type])
    defaults, common = _TOWERS.get(str(config.get("model_type")), ({}, {}))
    config = read_hf_config(config, tuple(VISION_FAMILIES), defaults, ignored=_UNUSED)
    require(config, num_channels=3)
    return from_dict(
        VisionEncoderConfig,
        {key: config[key] for key in defaults if key != "num_channels"} | common,
        where="config.json",
    )


def _parse_dinov2(config: dict) -> VisionEncoderConfig:
    registers = config.get("model_type") == "dinov2_with_registers"
    config = read_hf_config(
        config,
        ("dinov2", "dinov2_with_registers"),
        defaults=dict(
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            mlp_ratio=4,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
            image_size=224,
            patch_size=16 if registers else 14,
            num_channels=3,
            qkv_bias=True,
            use_swiglu_ffn=False,
            num_register_tokens=4 if registers else 0,
            interpolate_antialias=registers,
            interpolate_offset=0.0,  # which those with registers are published with
        ),
        ignored=(
            "layerscale_value",
            "drop_path_rate",
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
            "apply_layernorm",
            "reshape_hidden_states",
            "use_mask_token",
            "out_features",
            "out_indices",
            "_out_features",
            "_out_indices",
            "stage_names",
        ),
    )
    require(
        config,
        hidden_act="gelu",
        num_channels=3,
        qkv_bias=True,
        interpolate_antialias=registers,
        interpolate_offset=0.0,
    )
    width = config["hidden_size"]
    intermediate_size = int(width * config["mlp_ratio"])
    if config[
        "use_swiglu_ffn"
    ]:  # two thirds, so that three matrices weigh what two did; rounded up to 8
        intermediate_size = (int(intermediate_size * 2 / 3) + 7) // 8 * 8
    return from_dict(
        VisionEncoderConfig,
        dict(
            hidden_size=width,
            intermediate_size=intermediate_size,
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=config["num_attention_heads"],
            patch_size=config["patch_size"],
            image_size=config["image_size"],
            num_register_tokens=config["num_register_tokens"],
            swiglu=config["use_swiglu_ffn"],
            position_antialias=registers,
            layer_norm_eps=config["layer_norm_eps"],
        ),
        where="config.json",
    )


def _parse_qwen_vl(config: dict) -> VisionEncoderConfig:
    """The keys of the hub file's `visual`. Its `image_size` is that of the images; the table has
    `patch_positions`."""
    config = read_hf_config(
        config,
        ("qwen_vl_vision",),
        defaults=dict(
            width=1664,
            layers=48,
            heads=16,
            mlp_ratio=4.9231,
            patch_size=14,
            output_dim=4096,
            n_queries=256,
            patch_positions=256,
        ),
        ignored=("image_size", "image_start_id"),
    )
    return from_dict(
        VisionEncoderConfig,
        dict(
            hidden_size=config["width"],
            intermediate_size=int(config["width"] * config["mlp_ratio"]),
            num_hidden_layers=config["layers"],
            num_attention_heads=config["heads"],
            patch_size=config["patch_size"],
            image_size=math.isqrt(config["patch_positions"]) * config["patch_size"],
            class_token=False,
            layer_scale=False,
            patch_bias=False,
            embedding_norm=True,
            final_norm=False,
            num_queries=config["n_queries"],
            output_size=config["output_dim"],
        ),
        where="config.json",
    )


def _vision_part(config: Mapping[str, Any], tower: str) -> dict[str, Any]:
    """The tower's settings in the `config.json` of a whole model, with the tower's model_type."""
    part = config.get("vision_config")
    if not isinstance(part, Mapping):
        raise NanoVLMError(
            "config.json: key 'vision_config' is missing or no table; the tower's settings belong there"
        )
    newer = (
        config.get("vision_config_dict") or {}
    )  # older CLIP files repeat the settings that count
    return {**part, **newer, "model_type": tower}
