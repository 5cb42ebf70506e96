"""LLaVA (Liu et al. 2023, 2024), in the layout of `LlavaForConditionalGeneration`.

A vision encoder (CLIP, SigLIP or DINOv2), an MLP, and a language model (Vicuna, LLaMA or Qwen). The
vision encoder's vectors are taken before its final norm.
"""

from collections.abc import Mapping
from typing import Any

from nanovlm.errors import NanoVLMError, quoted
from nanovlm.hub.language_configs import parse_language_model_config
from nanovlm.hub.published.parts import Parts, parse_part, read_table, table_of
from nanovlm.hub.vision_configs import parse_vision_encoder_config
from nanovlm.model.projector import ProjectorConfig

# Where a tensor is in our model: the part, and what replaces the beginning of its published name.
NAMES = {
    "vision_tower.": ("vision_encoder", ""),
    "language_model.model.": ("language_model", "model."),
    "language_model.lm_head.": ("language_model", "lm_head."),
    "multi_modal_projector.linear_1.": ("projector", "up."),
    "multi_modal_projector.linear_2.": ("projector", "down."),
    # In newer folders. What is written has the names above, which every version reads.
    "model.vision_tower.": ("vision_encoder", ""),
    "model.language_model.": ("language_model", "model."),
    "lm_head.": ("language_model", "lm_head."),
    "model.multi_modal_projector.linear_1.": ("projector", "up."),
    "model.multi_modal_projector.linear_2.": ("projector", "down."),
}
_DEFAULTS: dict[str, Any] = dict(
    image_token_index=None,
    image_token_id=None,
    projector_hidden_act="gelu",
    multimodal_projector_bias=True,
    vision_feature_layer=-2,
    vision_feature_select_strategy="default",
    tie_word_embeddings=False,
)
# `image_seq_length` is what the image size and the patch size say.
_IGNORED = ("ignore_index", "image_seq_length", "vocab_size")
# The first token that is taken, and LLaVA's name of it: the class token is left out, or not.
STRATEGIES = {1: "default", 0: "full"}
_FIRST_TOKENS = {strategy: first for first, strategy in STRATEGIES.items()}


def parse_llava(config: Mapping[str, Any]) -> Parts:
    """Parse the `config.json` of a LLaVA; omitted settings take its defaults."""
    if "text_config" not in config:
        raise NanoVLMError(
            "config.json: model_type is 'llava' without a text_config, as in LLaVA's first "
            "publisher's layout, which is not read; take the same model in the layout of "
            "transformers, such as llava-hf/llava-1.5-7b-hf"
        )
    if isinstance(layers := config.get("vision_feature_layer"), list):
        raise NanoVLMError(
            "config.json: is a LLaVA whose projector gets several layers of its vision encoder "
            f"(vision_feature_layer = {quoted(layers)}), which is not implemented, only one"
        )
    settings = read_table(config, _DEFAULTS, _IGNORED)
    strategy = settings["vision_feature_select_strategy"]
    if strategy not in _FIRST_TOKENS:
        raise NanoVLMError(
            f"config.json: vision_feature_select_strategy = {quoted(strategy)} is not implemented, "
            "only 'default' and 'full'"
        )
    vision = table_of(config, "vision_config", "clip_vision_model")
    text = table_of(config, "text_config", "llama")
    if settings["tie_word_embeddings"]:  # or where the table says so
        text["tie_word_embeddings"] = True
    index = settings["image_token_index"]
    return Parts(
        vision_type=str(vision["model_type"]),
        vision_encoder=parse_part(parse_vision_encoder_config, vision, "vision_config"),
        language_type=str(text["model_type"]),
        language_model=parse_part(parse_language_model_config, text, "text_config"),
        projector=ProjectorConfig(
            "mlp",
            activation=settings["projector_hidden_act"],
            bias=settings["multimodal_projector_bias"],
        ),
        image_token_id=(settings["image_token_id"] or 32000) if index is None else index,
        vision_layer=settings["vision_feature_layer"],
        vision_norm=False,
        vision_first_token=_FIRST_TOKENS[strategy],
    )
