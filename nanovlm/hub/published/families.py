"""The families of published vision-language models, and reading a folder of one of them."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovlm.errors import NanoVLMError
from nanovlm.hub.chat_configs import read_chat_config
from nanovlm.hub.image_configs import read_image_config, read_processor
from nanovlm.hub.names import LANGUAGE_FAMILIES, VISION_FAMILIES, Target, renamed
from nanovlm.hub.published import llava, smolvlm
from nanovlm.hub.published.parts import Parts
from nanovlm.model.vlm import VLMConfig
from nanovlm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Family:
    """How a published family becomes our model.

    parse: its `config.json` → `Parts`.
    names: the beginning of a tensor's name → our part, and what replaces it.
    template: the chat template of a folder that holds none; None: the tokenizer decides.
    """

    parse: Callable[[Mapping[str, Any]], Parts]
    names: Mapping[str, tuple[str, str]]
    template: str | None = None

    def name_map(self, parts: Parts) -> Callable[[str], Target]:
        """The function from a published name to ours, for a model with these parts."""
        maps: dict[str, Callable[[str], Target]] = {
            "vision_encoder": VISION_FAMILIES[parts.vision_type].names(parts.vision_encoder),
            "language_model": LANGUAGE_FAMILIES[parts.language_type].names(parts.language_model),
            "projector": lambda name: name,
        }

        def ours(name: str) -> Target:
            for prefix, (part, beginning) in self.names.items():
                if name.startswith(prefix):
                    target = maps[part](beginning + name.removeprefix(prefix))
                    return renamed(target, lambda own, part=part: f"{part}.{own}")
            return name  # to be reported

        return ours

    def published_names(self, parts: Parts) -> Callable[[str], str]:
        """The inverse of `name_map`: from our name to the first that a file may use."""
        maps: dict[str, Callable[[str], str]] = {
            "vision_encoder": VISION_FAMILIES[parts.vision_type].published_names(),
            "language_model": LANGUAGE_FAMILIES[parts.language_type].published_names(),
            "projector": lambda name: name,
        }

        def theirs(name: str) -> str:
            part, _, own = name.partition(".")
            published = maps[part](own)
            for prefix, (other, beginning) in self.names.items():
                if other == part and published.startswith(beginning):
                    return prefix + published.removeprefix(beginning)
            raise KeyError(name)

        return theirs


_SMOLVLM = Family(smolvlm.parse_smolvlm, smolvlm.NAMES, template="smolvlm")

# By the model_type of `config.json`.
PUBLISHED = {
    "smolvlm": _SMOLVLM,
    "idefics3": _SMOLVLM,
    "llava": Family(llava.parse_llava, llava.NAMES),
}
# Relatives that are not implemented, and what they are.
OTHERS = {
    "llava_next": "LLaVA-NeXT, which cuts images at any resolution",
    "llava_next_video": "LLaVA-NeXT-Video, which cuts images at any resolution",
    "llava_onevision": "LLaVA-OneVision, which cuts images at any resolution",
    "llava_llama": "LLaVA in its first publisher's layout; the same model in the layout of "
    "transformers, such as llava-hf/llava-1.5-7b-hf, is read",
    "llava_qwen": "LLaVA in its first publisher's layout",
    "vipllava": "ViP-LLaVA, whose projector gets several layers of its vision encoder",
    "video_llava": "Video-LLaVA, a model of videos",
    "idefics": "Idefics, whose language model attends across to images",
    "idefics2": "Idefics2, whose projector is a perceiver; Idefics3 and SmolVLM are read",
    "paligemma": "PaliGemma, a Gemma",
    "qwen2_vl": "Qwen2-VL, which reads images of any shape",
    "qwen2_5_vl": "Qwen2.5-VL, which reads images of any shape",
    "qwen3_vl": "Qwen3-VL, which reads images of any shape",
    "internvl": "InternVL, which cuts images in another way",
}


def read_published(folder: Path, family: Family, parts: Parts, tokenizer: Tokenizer) -> VLMConfig:
    """The settings of a published model: what its `config.json` says, its images and its chat."""
    if read_processor(folder) is None:
        raise NanoVLMError(
            f"{folder}: holds neither preprocessor_config.json nor a processor_config.json that "
            "says how images are prepared; fetch it too"
        )
    chat = read_chat_config(folder, tokenizer, family.template)
    same_id = (text for text, id in tokenizer.special_tokens.items() if id == parts.image_token_id)
    image_token = next(same_id, None)
    if image_token is None:
        raise NanoVLMError(
            f"{folder}: the image token of config.json has the id {parts.image_token_id}, which is "
            "no special token of the tokenizer; do they belong together?"
        )
    return VLMConfig(
        vision_encoder=parts.vision_encoder,
        language_model=parts.language_model,
        projector=parts.projector,
        image=read_image_config(folder),
        chat=dataclasses.replace(chat, image_token=image_token),
        vision_layer=parts.vision_layer,
        vision_norm=parts.vision_norm,
        vision_first_token=parts.vision_first_token,
    )
