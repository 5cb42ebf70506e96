"""The `config.json` of each family of language models → `LanguageModelConfig`."""

from typing import Any

from nanovlm.errors import NanoVLMError, quoted
from nanovlm.hub.config_json import UNKNOWN, parse_hub_config, require
from nanovlm.hub.names import LANGUAGE_FAMILIES, OWN, OWN_BEFORE
from nanovlm.model.language_model import LanguageModelConfig
from nanovlm.utils.config import from_dict, unknown_key

# The reference's defaults, for what a family's files omit.
_SHARED_DEFAULTS: dict[str, Any] = dict(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=None,
    head_dim=None,
    hidden_act="silu",
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    rope_theta=None,
    rope_scaling={},
    rope_parameters={},
    attention_bias=False,
    mlp_bias=False,
    layer_types=[],
    use_sliding_window=False,
    rope_interleaved=False,
    partial_rotary_factor=1.0,
)
_QWEN2_DEFAULTS = _SHARED_DEFAULTS | dict(
    vocab_size=151936, intermediate_size=22016, max_position_embeddings=32768
)
_LLAMA_DEFAULTS = _SHARED_DEFAULTS | dict(
    vocab_size=32000, intermediate_size=11008, max_position_embeddings=2048
)
_MISTRAL_DEFAULTS = _SHARED_DEFAULTS | dict(
    vocab_size=32000, intermediate_size=14336, max_position_embeddings=131072, num_key_value_heads=8
)
_DEFAULTS = {
    "qwen2": _QWEN2_DEFAULTS,
    "qwen3": _QWEN2_DEFAULTS | dict(head_dim=128),
    "llama": _LLAMA_DEFAULTS,
    "mistral": _MISTRAL_DEFAULTS,
}
_QWEN1_DEFAULTS: dict[str, Any] = dict(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=22016,
    num_hidden_layers=32,
    num_attention_heads=32,
    kv_channels=128,
    layer_norm_epsilon=1e-6,
    max_position_embeddings=8192,
    seq_length=None,
    rotary_emb_base=10000.0,
    rotary_pct=1.0,
    use_dynamic_ntk=True,
    use_logn_attn=True,
    no_bias=True,
    scale_attn_weights=True,
    tie_word_embeddings=False,
)

# `sliding_window` and `max_window_layers` have an effect with `use_sliding_window` alone, which is
# refused, and in Mistral, where `_parse_llama` refuses the first.
_IGNORED = (
    "attention_dropout", "sliding_window", "max_window_layers", "use_mrope", "pretraining_tp",
    "is_llama_config", "max_sequence_length",
)  # fmt: skip
# Dropouts are 0 in every published file and off in inference; `rope_theta` repeats
# `rotary_emb_base` for programs other than the reference; the others are about kernels, number
# formats and exports.
_QWEN1_IGNORED = (
    "attn_dropout_prob", "emb_dropout_prob", "bf16", "fp16", "fp32", "onnx_safe",
    "softmax_in_fp32", "use_flash_attn", "use_cache_quantization", "use_cache_kernel",
    "rope_theta", "tokenizer_class", "tokenizer_type",
)  # fmt: skip

# Settings that all families and `LanguageModelConfig` call the same.
_SAME_NAMES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip

# The settings of RoPE, with the reference's defaults; then those of LLaMA 3's scaling and our
# names of them.
_ROPE_DEFAULTS = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
_LLAMA3_ROPE = {
    "factor": "rope_factor",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
}


def parse_language_model_config(config: dict[str, Any]) -> LanguageModelConfig:
    """Parse the `config.json` of a folder of any family in LANGUAGE_FAMILIES.

    Omitted settings take the reference's defaults; RoPE's are read in their older and newer
    spellings. In a folder that `save_language_model` wrote, settings have the names of
    `LanguageModelConfig`.
    """
    model_type = config.get("model_type")
    if model_type == OWN_BEFORE:
        raise NanoVLMError(f"config.json: model_type {model_type!r} is now {OWN!r}; rename it")
    if model_type == OWN:
        settings = {name: value for name, value in config.items() if name != "model_type"}
    elif model_type == "qwen":
        settings = _parse_qwen1(config)
    else:
        settings = _parse_llama(config)
    return from_dict(LanguageModelConfig, settings, where="config.json")


def _parse_llama(config: dict[str, Any]) -> dict[str, Any]:
    """Of LLaMA and the families that descend from it: Mistral, Qwen 1.5 and later."""
    family = str(config.get("model_type"))
    window = config.get("sliding_window", 4096)  # null, which is implemented, is no omission here
    if family == "mistral" and window is not None:
        raise NanoVLMError(
            f"config.json: sliding_window = {quoted(window)} is not implemented, only null"
        )
    defaults = _DEFAULTS.get(family, _SHARED_DEFAULTS)
    config = parse_hub_config(config, LANGUAGE_FAMILIES, defaults, _IGNORED)
    require(config, hidden_act="silu", use_sliding_window=False, rope_interleaved=False)
    require(config, partial_rotary_factor=1.0)
    other_layers = [kind for kind in config["layer_types"] if kind != "full_attention"]
    require({"layer_types": other_layers}, layer_types=[])
    if family != "llama":
        require(config, mlp_bias=False)
    if family not in ("llama", "qwen2"):  # Qwen2 has biases, whatever its file says
        require(config, attention_bias=False)

    same_names = (*_SAME_NAMES, "intermediate_size", "rms_norm_eps", "mlp_bias")
    heads, key_value_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config["head_dim"]
    return {
        **{name: config[name] for name in same_names},
        **_parse_rope(config),
        "qkv_bias": family == "qwen2" or config["attention_bias"],
        "output_bias": family != "qwen2" and config["attention_bias"],
        "qk_norm": family == "qwen3",
        "num_key_value_heads": heads if key_value_heads is None else key_value_heads,
        "head_dim": config["hidden_size"] // heads if head_dim is None else head_dim,
    }


def _parse_rope(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE's settings: one table in newer files; `rope_theta` and perhaps a table in older ones."""
    table = "rope_parameters" if config["rope_parameters"] else "rope_scaling"
    where = f"config.json: {table}"
    given = {key: value for key, value in config[table].items() if value is not None}
    if "type" in given:  # the oldest spelling
        given.setdefault("rope_type", given.pop("type"))
    rope_type = given.get("rope_type", "default")
    if rope_type not in ("default", "llama3"):
        raise NanoVLMError(
            f"{where}: rope_type = {quoted(rope_type)} is not implemented, "
            "only 'default' and 'llama3'"
        )
    require(given, where, partial_rotary_factor=1.0)
    scaling = _LLAMA3_ROPE if rope_type == "llama3" else {}
    known = (*_ROPE_DEFAULTS, *scaling)
    for key in given:
        if key not in known:
            raise unknown_key(key, known, where, UNKNOWN)
    for key in scaling:
        if key not in given:
            raise NanoVLMError(f"{where}: key {key!r} is missing")
    theta = config["rope_theta"]
    theta = given.get("rope_theta", _ROPE_DEFAULTS["rope_theta"]) if theta is None else theta
    stretched = {ours: given[theirs] for theirs, ours in scaling.items()}
    return {"rope_type": rope_type, "rope_theta": theta, **stretched}


def _parse_qwen1(config: dict[str, Any]) -> dict[str, Any]:
    """Of Qwen's first generation, such as Qwen-7B-Chat.

    `seq_length` is the length trained at first, `intermediate_size` the width of gate and values
    together.
    """
    config = parse_hub_config(config, LANGUAGE_FAMILIES, _QWEN1_DEFAULTS, _QWEN1_IGNORED)
    require(config, rotary_pct=1.0, no_bias=True, scale_attn_weights=True)
    stretched = config["use_dynamic_ntk"] or config["use_logn_attn"]
    if stretched and config["seq_length"] is None:
        raise NanoVLMError(
            "config.json: key 'seq_length' is missing; use_dynamic_ntk and use_logn_attn need it"
        )
    if (width := config["intermediate_size"]) % 2:
        raise NanoVLMError(f"config.json: intermediate_size = {width} has to be even")
    return {
        **{name: config[name] for name in _SAME_NAMES},
        "intermediate_size": width // 2,
        "num_key_value_heads": config["num_attention_heads"],
        "head_dim": config["kv_channels"],
        "qkv_bias": True,
        "rms_norm_eps": config["layer_norm_epsilon"],
        "rope_theta": config["rotary_emb_base"],
        "rope_type": "dynamic_ntk" if config["use_dynamic_ntk"] else "default",
        "original_max_position_embeddings": config["seq_length"] if stretched else 0,
        "logn_attention": config["use_logn_attn"],
    }
