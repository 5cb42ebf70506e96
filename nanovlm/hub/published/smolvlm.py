"""SmolVLM, SmolVLM2 and Idefics3 (Laurençon et al. 2024; Marafioti et al. 2025).

A vision encoder of SigLIP's design, a pixel shuffle with one matrix, and a LLaMA (SmolLM2). Images
are cut into tiles.
"""

from collections.abc import Mapping
from typing import Any

from nanovlm.hub.config_json import require
from nanovlm.hub.language_configs import parse_language_model_config
from nanovlm.hub.published.parts import Parts, parse_part, read_table, table_of
from nanovlm.hub.vision_configs import parse_vision_encoder_config
from nanovlm.model.projector import ProjectorConfig

# Where a tensor is in our model: the part, and what replaces the beginning of its published name.
NAMES = {
    "model.vision_model.": ("vision_encoder", ""),
    "model.text_model.": ("language_model", "model."),
    "lm_head.": ("language_model", "lm_head."),
    "model.connector.modality_projection.proj.": ("projector", "linear."),
}
_DEFAULTS: dict[str, Any] = dict(scale_factor=2, image_token_id=128257, tie_word_embeddings=False)
# `image_seq_len` is what the image size, the patch size and the scale say.
_IGNORED = ("image_seq_len", "vocab_size", "use_reentrant_checkpointing")
# Settings of the language model's table for parts that these models do not have.
_TEXT_IGNORED = (
    "neftune_noise_alpha", "perceiver_config", "pixel_shuffle_factor", "qk_layer_norms",
    "use_resampler", "_flash_attn_2_enabled",
)  # fmt: skip


def parse_smolvlm(config: Mapping[str, Any]) -> Parts:
    """Parse the `config.json` of a SmolVLM or Idefics3; omitted settings take its defaults."""
    settings = read_table(config, _DEFAULTS, _IGNORED)
    text = table_of(config, "text_config", "llama")
    require(text, "config.json: text_config", use_resampler=False, qk_layer_norms=False)
    text = {key: value for key, value in text.items() if key not in _TEXT_IGNORED}
    # The whole model's setting counts, not the table's.
    text["tie_word_embeddings"] = settings["tie_word_embeddings"]
    return Parts(
        vision_type=str(config["model_type"]),
        vision_encoder=parse_part(parse_vision_encoder_config, dict(config), "vision_config"),
        language_type=str(text["model_type"]),
        language_model=parse_part(parse_language_model_config, text, "text_config"),
        projector=ProjectorConfig("pixel_shuffle", scale=settings["scale_factor"], bias=False),
        image_token_id=settings["image_token_id"],
    )
