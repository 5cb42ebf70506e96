"""What the decoder families' `config.json` say, as the settings of a `LanguageModelConfig`. What is
not implemented is refused."""

from typing import Any

from nanovlm.errors import NanoVLMError
from nanovlm.hub.config_json import read_hf_config, require
from nanovlm.hub.families import LANGUAGE_FAMILIES, OWN
from nanovlm.model.language_model import LanguageModelConfig
from nanovlm.utils.config import from_dict, unknown_key

SHARED = dict(
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
)
DEFAULTS: dict[
    str, dict[str, Any]
] = {  # of the reference implementation, where a family's file leaves a key out
    "qwen2": SHARED
    | dict(vocab_size=151936, intermediate_size=22016, max_position_embeddings=32768),
    "qwen3": SHARED
    | dict(vocab_size=151936, intermediate_size=22016, max_position_embeddings=32768, head_dim=128),
    "llama": SHARED | dict(vocab_size=32000, intermediate_size=11008, max_position_embeddings=2048),
    "mistral": SHARED
    | dict(
        vocab_size=32000,
        intermediate_size=14336,
        max_position_embeddings=131072,
        num_key_value_heads=8,
    ),
}
IGNORED = (
    "attention_dropout",
    "sliding_window",
    "max_window_layers",
    "use_mrope",
    "pretraining_tp",
    "is_llama_config",
    "max_sequence_length",
    "transformers.js_config",
)

QWEN1_DEFAULTS = dict(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=22016,
    num_hidden_layers=32,
    num_attention_heads=32,
    kv_channels=128,
    layer_norm_epsilon=1e-6,
    max_position_embeddings=8192,
    seq_length=None,
    rotary_emb_base=10000,
    rotary_pct=1.0,
    use_dynamic_ntk=True,
    use_logn_attn=True,
    no_bias=True,
    scale_attn_weights=True,
    tie_word_embeddings=False,
)
# Dropouts are 0 in every published file and off when it is used; `rope_theta` says
# `rotary_emb_base` once more, to other programs than the reference; the rest is about kernels,
# number formats and exports.
QWEN1_IGNORED = (
    "attn_dropout_prob",
    "emb_dropout_prob",
    "bf16",
    "fp16",
    "fp32",
    "onnx_safe",
    "softmax_in_fp32",
    "use_flash_attn",
    "use_cache_quantization",
    "use_cache_kernel",
    "rope_theta",
    "tokenizer_class",
    "tokenizer_type",
)
SAME_NAMES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "tie_word_embeddings",
)

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
LLAMA3_ROPE = {
    "factor": "rope_factor",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
}


def read_language_config(config: dict) -> dict[str, Any]:
    """The settings of a decoder folder's `config.json`, by the names of `LanguageModelConfig`'s
    fields."""
    return _read_qwen1(config) if config.get("model_type") == "qwen" else _read_llama(config)


def _read_llama(config: dict) -> dict[str, Any]:
    """LLaMA and the families that descend from it."""
    family = config.get("model_type")
    if family == "mistral" and config.get("sliding_window", 4096) is not None:
        window = config.get("sliding_window", 4096)
        raise NanoVLMError(
            f"config.json: sliding_window = {window!r} is not implemented, only null"
        )
    config = read_hf_config(config, tuple(LANGUAGE_FAMILIES), DEFAULTS.get(family, SHARED), IGNORED)
    require(config, hidden_act="silu", use_sliding_window=False, rope_interleaved=False)
    require(
        {"layer_types": [kind for kind in config["layer_types"] if kind != "full_attention"]},
        layer_types=[],
    )
    if family != "llama":
        require(config, mlp_bias=False)
        if family != "qwen2":  # which has biases, whatever its file says
            require(config, attention_bias=False)
    heads = config["num_attention_heads"]
    return {
        **{
            name: config[name]
            for name in (*SAME_NAMES, "intermediate_size", "rms_norm_eps", "mlp_bias")
        },
        **_read_rope(config),
        "qkv_bias": family == "qwen2" or config["attention_bias"],
        "output_bias": family != "qwen2" and config["attention_bias"],
        "qk_norm": family == "qwen3",
        "num_key_value_heads": config["num_key_value_heads"] or heads,
        "head_dim": config["head_dim"] or config["hidden_size"] // max(heads, 1),
    }


def _read_rope(config: dict) -> dict[str, Any]:
    """RoPE's settings: one object in newer files, `rope_theta` and perhaps `rope_scaling` in older
    ones."""
    spelling = "rope_parameters" if config["rope_parameters"] else "rope_scaling"
    where, given = f"config.json: {spelling}", dict(config[spelling])
    if "type" in given:  # as the oldest spell it
        given.setdefault("rope_type", given.pop("type"))
    kind = given.get("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise NanoVLMError(
            f"{where}: rope_type = {kind!r} is not implemented, only 'default' and 'llama3'"
        )
    require(given, where, partial_rotary_factor=1.0)
    scaling = LLAMA3_ROPE if kind == "llama3" else {}
    for key in given:
        if key not in (*ROPE, *scaling):
            raise unknown_key(key, (*ROPE, *scaling), where)
    for key in scaling:
        if key not in given:
            raise NanoVLMError(f"{where}: key {key!r} is missing")
    return {
        "rope_type": kind,
        "rope_theta": config["rope_theta"] or given.get("rope_theta", ROPE["rope_theta"]),
        **{ours: given[theirs] for theirs, ours in scaling.items()},
    }


def _read_qwen1(config: dict) -> dict[str, Any]:
    """Qwen's first generation, such as Qwen-7B-Chat. `seq_length` is the length first trained at,
    `intermediate_size` that of gate and values together."""
    config = read_hf_config(config, tuple(LANGUAGE_FAMILIES), QWEN1_DEFAULTS, QWEN1_IGNORED)
    require(config, rotary_pct=1.0, no_bias=True, scale_attn_weights=True)
    stretched = config["use_dynamic_ntk"] or config["use_logn_attn"]
    if stretched and config["seq_length"] is None:
        raise NanoVLMError(
            "config.json: key 'seq_length' is missing, which use_dynamic_ntk and use_logn_attn go by"
        )
    if type(config["intermediate_size"]) is int and config["intermediate_size"] % 2:
        raise NanoVLMError(
            f"config.json: intermediate_size = {config['intermediate_size']} has to be even"
        )
    return {
        **{name: config[name] for name in SAME_NAMES},
        "intermediate_size": config["intermediate_size"] // 2,
        "num_key_value_heads": config["num_attention_heads"],
        "head_dim": config["kv_channels"],
        "qkv_bias": True,
        "rms_norm_eps": config["layer_norm_epsilon"],
        "rope_theta": config["rotary_emb_base"],
        "rope_type": "dynamic_ntk" if config["use_dynamic_ntk"] else "default",
        "original_max_position_embeddings": config["seq_length"] if stretched else 0,
        "logn_attention": config["use_logn_attn"],
    }


def parse_language_model_config(config: dict) -> LanguageModelConfig:
    """Read the `config.json` of a folder of any family in LANGUAGE_FAMILIES; older and newer
    spellings of RoPE's settings. A decoder of our own (`LanguageModel.save_pretrained`) has the
    names of this class."""
    if config.get("model_type") == OWN:
        return from_dict(
            LanguageModelConfig,
            {key: value for key, value in config.items() if key != "model_type"},
            where="config.json",
        )
    return from_dict(LanguageModelConfig, read_language_config(config), where="config.json")
