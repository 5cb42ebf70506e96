"""The `config.json` of each family of vision encoders → `VisionEncoderConfig`."""

import math
from collections.abc import Mapping
from typing import Any

from nanovlm.errors import NanoVLMError
from nanovlm.hub.config_json import parse_hub_config, require
from nanovlm.hub.names import VISION_FAMILIES
from nanovlm.model.vision_encoder import VisionEncoderConfig
from nanovlm.utils.config import from_dict

# The reference's defaults, for what a family's files omit.
_SHARED_DEFAULTS: dict[str, Any] = dict(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_channels=3, image_size=224
)
_SIGLIP_DEFAULTS = _SHARED_DEFAULTS | dict(
    intermediate_size=3072, patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6
)
_CLIP_DEFAULTS = _SHARED_DEFAULTS | dict(
    intermediate_size=3072, patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5
)
_SMOLVLM_DEFAULTS = _SIGLIP_DEFAULTS | dict(hidden_size=1152, num_attention_heads=16, patch_size=32)
_DINOV2_DEFAULTS = _SHARED_DEFAULTS | dict(
    mlp_ratio=4.0,
    hidden_act="gelu",
    layer_norm_eps=1e-6,
    patch_size=14,
    qkv_bias=True,
    use_swiglu_ffn=False,
    num_register_tokens=0,
    interpolate_antialias=False,
    interpolate_offset=0.0,  # the value that those with registers are published with
)
_REGISTERS_DEFAULTS = _DINOV2_DEFAULTS | dict(
    patch_size=16, num_register_tokens=4, interpolate_antialias=True
)
_QWEN_VL_DEFAULTS: dict[str, Any] = dict(
    width=1664,
    layers=48,
    heads=16,
    mlp_ratio=4.9231,
    patch_size=14,
    output_dim=4096,
    n_queries=256,
    patch_positions=256,
)

# What all models of a family have in common, of which their files say nothing.
_SIGLIP_DESIGN = dict(class_token=False, layer_scale=False)
_SMOLVLM_DESIGN = _SIGLIP_DESIGN | dict(position_resize="nearest")
_CLIP_DESIGN = dict(layer_scale=False, patch_bias=False, embedding_norm=True, final_norm=False)
_QWEN_VL_DESIGN = _CLIP_DESIGN | dict(class_token=False)

# By model_type: the settings that a file may give, and the design.
_FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "siglip_vision_model": (_SIGLIP_DEFAULTS, _SIGLIP_DESIGN),
    "clip_vision_model": (_CLIP_DEFAULTS, _CLIP_DESIGN),
    "smolvlm_vision": (_SMOLVLM_DEFAULTS, _SMOLVLM_DESIGN),
    "idefics3_vision": (_SMOLVLM_DEFAULTS, _SMOLVLM_DESIGN),
}

# Whole models, and the model_type of the vision encoder whose settings are in their file's
# `vision_config`. (The table's own model_type is often the whole model's.)
_WHOLE_MODELS = {
    "siglip": "siglip_vision_model",
    "clip": "clip_vision_model",
    "smolvlm": "smolvlm_vision",
    "idefics3": "idefics3_vision",
}

# Settings of training, of parts behind the vision encoder, and of how images are cut into tiles.
_IGNORED = (
    "attention_dropout", "dropout", "initializer_factor", "projection_dim", "vision_use_head",
    "vocab_size", "use_base_siglip", "max_image_size", "size", "tie_word_embeddings",
)  # fmt: skip
_DINOV2_IGNORED = (
    "layerscale_value", "drop_path_rate", "hidden_dropout_prob", "attention_probs_dropout_prob",
    "apply_layernorm", "reshape_hidden_states", "use_mask_token", "out_features", "out_indices",
    "_out_features", "_out_indices", "stage_names",
)  # fmt: skip


def parse_vision_encoder_config(config: dict[str, Any]) -> VisionEncoderConfig:
    """Parse the `config.json` of a vision encoder or of a whole SigLIP, CLIP, SmolVLM or Idefics3.

    model_type "qwen_vl_vision" is Qwen-VL's, as `data_tools/extract_vision.py` writes it. Omitted
    settings take the reference's defaults.
    """
    model_type = config.get("model_type")
    if model_type in ("dinov2", "dinov2_with_registers"):
        settings = _parse_dinov2(config)
    elif model_type == "qwen_vl_vision":
        settings = _parse_qwen_vl(config)
    elif model_type in ("siglip2", "siglip2_vision_model"):
        raise NanoVLMError(
            f"config.json: model_type is {model_type!r}, which reads images of any shape (NaFlex) "
            "and is not implemented; take a SigLIP 2 of a fixed size, such as "
            "siglip2-base-patch16-256"
        )
    else:
        settings = _parse_siglip_or_clip(config)
    return from_dict(VisionEncoderConfig, settings, where="config.json")


def _parse_siglip_or_clip(config: dict[str, Any]) -> dict[str, Any]:
    """Of SigLIP, CLIP, SmolVLM or Idefics3, alone or within a whole model."""
    model_type = str(config.get("model_type"))
    if model_type in _WHOLE_MODELS:
        model_type = _WHOLE_MODELS[model_type]
        config = {**_vision_table(config), "model_type": model_type}
    defaults, design = _FAMILIES.get(model_type, ({}, {}))
    config = parse_hub_config(config, VISION_FAMILIES, defaults, _IGNORED)
    require(config, num_channels=3)
    return {name: config[name] for name in defaults if name != "num_channels"} | design


def _vision_table(config: Mapping[str, Any]) -> dict[str, Any]:
    """The vision encoder's settings in the `config.json` of a whole model."""
    table = config.get("vision_config")
    if not isinstance(table, Mapping):
        raise NanoVLMError(
            "config.json: key 'vision_config' is missing or no table; "
            "the vision encoder's settings belong there"
        )
    # Older CLIP files repeat the settings in a second table, and those of the second one count.
    repeated = config.get("vision_config_dict")
    return {**table, **repeated} if isinstance(repeated, Mapping) else dict(table)


def _parse_dinov2(config: dict[str, Any]) -> dict[str, Any]:
    registers = config["model_type"] == "dinov2_with_registers"
    defaults = _REGISTERS_DEFAULTS if registers else _DINOV2_DEFAULTS
    config = parse_hub_config(config, VISION_FAMILIES, defaults, _DINOV2_IGNORED)
    require(config, hidden_act="gelu", num_channels=3, qkv_bias=True)
    require(config, interpolate_antialias=registers, interpolate_offset=0.0)
    intermediate_size = int(config["hidden_size"] * config["mlp_ratio"])
    if config["use_swiglu_ffn"]:
        # Two thirds, so that three matrices have the parameters of two; a multiple of 8.
        intermediate_size = (int(intermediate_size * 2 / 3) + 7) // 8 * 8
    same_names = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size",
        "num_register_tokens", "layer_norm_eps",
    )  # fmt: skip
    return {
        **{name: config[name] for name in same_names},
        "intermediate_size": intermediate_size,
        "swiglu": config["use_swiglu_ffn"],
        "position_antialias": registers,
    }


def _parse_qwen_vl(config: dict[str, Any]) -> dict[str, Any]:
    """Of the table `visual` in Qwen-VL's file, and `patch_positions`, the length of the position
    table. The file's `image_size` is that of the images."""
    ignored = ("image_size", "image_start_id")
    config = parse_hub_config(config, VISION_FAMILIES, _QWEN_VL_DEFAULTS, ignored)
    return {
        "hidden_size": config["width"],
        "intermediate_size": int(config["width"] * config["mlp_ratio"]),
        "num_hidden_layers": config["layers"],
        "num_attention_heads": config["heads"],
        "patch_size": config["patch_size"],
        "image_size": math.isqrt(config["patch_positions"]) * config["patch_size"],
        "num_queries": config["n_queries"],
        "output_size": config["output_dim"],
        **_QWEN_VL_DESIGN,
    }
