"""Families of published models: by which names their files call our tensors."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from nanovlm.hub.names import (
    CLIP,
    DINOV2,
    LLAMA,
    QWEN,
    QWEN1,
    SIGLIP,
    NameTable,
    Target,
    qwen_vl_vision,
    translate,
)


@dataclass(frozen=True)
class Family:
    """How the files of a family name our tensors.

    table: from their names to ours, or a function of the model's config that returns it.
    prefix: a pattern of what may precede a name; it depends on the class that saved the file.
    unused: shell-style patterns of names, without prefix, of other parts of the published model.
    """

    table: NameTable | Callable[[Any], NameTable]
    prefix: str = ""
    unused: tuple[str, ...] = ()

    def names(self, config: Any) -> Callable[[str], Target]:
        """The function from a published name to ours, for a model of shape `config`."""
        ours = translate(self.table(config) if callable(self.table) else self.table)
        prefix = re.compile(rf"\A(?:{self.prefix})")

        def name_map(name: str) -> Target:
            name = prefix.sub("", name, count=1)
            unused = any(fnmatchcase(name, pattern) for pattern in self.unused)
            return None if unused else ours(name)

        return name_map


_VISION_PREFIX = r"(vision_model\.)?"
_SIGLIP = Family(
    SIGLIP, _VISION_PREFIX, unused=("head.*", "text_model.*", "logit_scale", "logit_bias")
)
_CLIP = Family(
    CLIP,
    _VISION_PREFIX,
    unused=("text_model.*", "text_projection.*", "visual_projection.*", "logit_scale"),
)
_SMOLVLM = Family(
    SIGLIP,
    prefix=r"(model\.vision_model\.)?",
    unused=("model.text_model.*", "model.connector.*", "lm_head.*"),
)
_QWEN_VL = Family(
    lambda config: qwen_vl_vision(config.num_attention_heads), prefix=r"(transformer\.visual\.)?"
)

OWN = (
    "nanovlm_language_model"  # the model_type of a language model that `save_language_model` wrote
)
OWN_BEFORE = "nanovlm_decoder"  # the same before version 0.2

# By the model_type of `config.json`.
VISION_FAMILIES = {
    "dinov2": Family(DINOV2),
    "dinov2_with_registers": Family(DINOV2),
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "smolvlm": _SMOLVLM,
    "smolvlm_vision": _SMOLVLM,
    "idefics3": _SMOLVLM,
    "idefics3_vision": _SMOLVLM,
    "qwen_vl_vision": _QWEN_VL,
}
LANGUAGE_FAMILIES = {
    "qwen": Family(QWEN1),
    "qwen2": Family(QWEN),
    "qwen3": Family(QWEN),
    "llama": Family(LLAMA),
    "mistral": Family(LLAMA),
    OWN: Family({}),  # under our own names
}
