"""The model that a run starts from, and what a run makes of it before the first step."""

import dataclasses
from pathlib import Path

import torch

from nanovlm.errors import NanoVLMError
from nanovlm.files import read_json
from nanovlm.image import ImageConfig
from nanovlm.projector import ProjectorConfig
from nanovlm.training.freezing import freeze
from nanovlm.training.lora import LoRAConfig, add_adapters
from nanovlm.training.quantization import quantize_
from nanovlm.training.settings import Settings
from nanovlm.vlm import VisionLanguageModel


def build_model(settings: Settings) -> VisionLanguageModel:
    """The model a run starts from: a folder of ours, or eyes and voice joined by a new projector."""
    if settings.init:
        return VisionLanguageModel.from_pretrained(settings.init)
    if not settings.vision or not settings.text:
        raise NanoVLMError("nothing to start from; give --init, or --vision and --text")
    projector, image = projector_and_image(settings)
    return VisionLanguageModel.from_parts(settings.vision, settings.text, projector, image, settings.vision_layer)


def projector_and_image(settings: Settings) -> tuple[ProjectorConfig, ImageConfig]:
    """What joins eyes and voice, and how the eyes are shown an image: as their folder says, where it says so."""
    preprocessor = Path(settings.vision) / "preprocessor_config.json"
    image = ImageConfig.from_hf(read_json(preprocessor)) if settings.vision and preprocessor.exists() else ImageConfig()
    if image.fit == "crop":  # which might cut off what is asked about: the whole picture is squashed into the square
        image = dataclasses.replace(image, fit="squash", shortest_edge=None)
    image = dataclasses.replace(image, height=settings.image_size or image.height, width=settings.image_size or image.width)
    return ProjectorConfig(settings.projector, settings.grid, settings.scale), image


def set_up(model: VisionLanguageModel, settings: Settings, device: torch.device) -> None:
    """Quantise, adapt and freeze what `settings` name. What is quantised moves to `device`, the rest stays where it is."""
    if settings.quantize:
        quantize_(model.decoder.blocks, settings.quantize, device)
    if settings.lora_rank:
        add_adapters(model.decoder, LoRAConfig.from_settings(settings))
    freeze(model, settings)
