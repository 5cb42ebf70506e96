"""`VisionEncoderConfig` and `LanguageModelConfig` as tables of a published `config.json`.

A table is right if the reader of that family makes the config of it. So the readers in
`nanovlm/hub` say which family a part belongs to, and here stands what they expect.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from nanovlm.errors import NanoVLMError
from nanovlm.hub.language_configs import parse_language_model_config
from nanovlm.hub.vision_configs import parse_vision_encoder_config
from nanovlm.model.language_model import LanguageModelConfig
from nanovlm.model.vision_encoder import VisionEncoderConfig

Table = dict[str, Any]
LLAVA_VISION = ("siglip_vision_model", "clip_vision_model", "dinov2", "dinov2_with_registers")
ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}
# What a language model may have that no published family has here, and what would do instead.
_PLAIN = LanguageModelConfig()
_REFUSED: dict[str, tuple[Callable[[LanguageModelConfig], bool], str]] = {
    "experts (num_experts)": (lambda it: it.num_experts > 0, "one MLP a block"),
    "learned positions (positions)": (lambda it: it.positions != "rotary", "rotary positions"),
    "layer norms (norm)": (lambda it: it.norm != "rms", 'norm = "rms"'),
    "MLPs without a gate (mlp)": (lambda it: it.mlp != "gated", 'mlp = "gated"'),
    "a reducer (embedding_size)": (lambda it: it.embedding_size > 0, "embedding_size = 0"),
    "the first Qwen's dynamic NTK (rope_type)": (
        lambda it: it.rope_type == "dynamic_ntk" or it.logn_attention,
        "Qwen2.5 or Qwen3",
    ),
}


def vision_table(config: VisionEncoderConfig, families: tuple[str, ...]) -> Table:
    """The table, with its model_type, of the first of `families` that has such an encoder."""
    for table in _vision_tables(config):
        if table["model_type"] in families and _is(parse_vision_encoder_config, table, config):
            return table
    raise NanoVLMError(
        f"its vision encoder is none of {', '.join(families)}"
        + (": it has a resampler (num_queries)" if config.num_queries else "")
        + "; train with DINOv2, CLIP or SigLIP to export a model"
    )


def _vision_tables(config: VisionEncoderConfig) -> Iterator[Table]:
    same = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size",
        "layer_norm_eps",
    )  # fmt: skip
    shape = {name: getattr(config, name) for name in same}
    for family in ("siglip_vision_model", "clip_vision_model", "idefics3_vision", "smolvlm_vision"):
        sizes = {"intermediate_size": config.intermediate_size, "hidden_act": config.hidden_act}
        table = {"model_type": family, **shape, **sizes}
        # Without the head that pools patches, which is no part of ours.
        yield table | ({"vision_use_head": False} if family == "siglip_vision_model" else {})
    ratio = config.intermediate_size / config.hidden_size
    # A gated MLP has two thirds of the width, rounded; published ones are of ratio 4.
    mlp = {"mlp_ratio": 4, "use_swiglu_ffn": True} if config.swiglu else {"mlp_ratio": int(ratio)}
    yield {"model_type": "dinov2", **shape, **mlp}
    registers = config.num_register_tokens
    yield {"model_type": "dinov2_with_registers", **shape, **mlp, "num_register_tokens": registers}


def language_table(config: LanguageModelConfig) -> Table:
    """The table, with its model_type, of the family that has such a language model."""
    for what, (has, instead) in _REFUSED.items():
        if has(config):
            raise NanoVLMError(
                f"its language model has {what}, which no language model of transformers that "
                f"nanovlm reads has; one with {instead} can be exported"
            )
    # Settings of training, and of parts that it does not have, change no forward pass.
    unused = ("dropout", "reducer_size", "experts_per_token", "num_shared_experts", "balance_loss")
    plain = replace(config, **{name: getattr(_PLAIN, name) for name in unused})
    for family in ARCHITECTURES:
        table = _language_table(plain, family)
        if _is(parse_language_model_config, table, plain):
            return table
    raise NanoVLMError(
        "its language model mixes what Qwen3 (qk_norm), Qwen2 (qkv_bias) and LLaMA (all biases of "
        "the attention, or none) have, so it is none of them; one of these can be exported"
    )


def _language_table(config: LanguageModelConfig, family: str) -> Table:
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta",
        "max_position_embeddings", "tie_word_embeddings",
    )  # fmt: skip
    table: Table = {"model_type": family, "architectures": [ARCHITECTURES[family]]}
    table |= {name: getattr(config, name) for name in same} | {"hidden_act": "silu"}
    if config.rope_type == "llama3":
        table["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": config.rope_factor,
            "low_freq_factor": config.rope_low_freq_factor,
            "high_freq_factor": config.rope_high_freq_factor,
            "original_max_position_embeddings": config.original_max_position_embeddings,
        }
    if family == "llama":
        table |= {"attention_bias": config.output_bias, "mlp_bias": config.mlp_bias}
    return table


def _is(parse: Callable[[Table], Any], table: Table, config: Any) -> bool:
    """Whether the reader of published configs makes `config` of `table`."""
    try:
        return parse(table) == config
    except NanoVLMError:
        return False
