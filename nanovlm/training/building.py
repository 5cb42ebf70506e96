"""The model that a run starts from, and what a run makes of it before the first step."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nanovlm.chat import ChatConfig
from nanovlm.decoder import DecoderConfig
from nanovlm.errors import NanoVLMError, say
from nanovlm.files import read_json
from nanovlm.image_config import ImageConfig, read_processor
from nanovlm.projector import ProjectorConfig
from nanovlm.shapes import EYES, VOICES, toy_model
from nanovlm.training.freezing import freeze
from nanovlm.training.lora import LoRAConfig, add_adapters
from nanovlm.training.quantization import quantize_
from nanovlm.training.settings import Settings
from nanovlm.vit import VisionConfig
from nanovlm.vlm import VisionLanguageModel, VLMConfig


def build_model(settings: Settings) -> VisionLanguageModel:
    """The model a run starts from: a folder of ours, eyes and voice joined by a new projector, or all of it at toy widths."""
    if settings.init:
        unused = [
            f"--{setting.name.replace('_', '-')}"
            for setting in dataclasses.fields(settings)
            if setting.metadata["group"] == "model"
            and setting.name not in ("init", "tiny")
            and getattr(settings, setting.name) != setting.default
        ]
        if unused:
            say(
                f"--init {settings.init} is a whole model, so nothing is made of {', '.join(unused)}"
            )
        return VisionLanguageModel.from_pretrained(settings.init)
    if settings.objective == "dpo":
        raise NanoVLMError(
            "--objective dpo makes a trained model better and needs one to start from; give --init"
        )
    if settings.tiny:
        return toy_model(planned_config(settings))
    _check_folders(settings)
    config = planned_config(settings)
    if read_processor(Path(settings.vision)) is None:
        say(
            f"{settings.vision}: holds no preprocessor_config.json; images are prepared as for "
            + (settings.vision if settings.vision in EYES else "DINOv2")
            + f", {config.image.width}×{config.image.height} pixels"
        )
    return VisionLanguageModel.from_parts(
        settings.vision,
        settings.text,
        config.projector,
        config.image,
        config.vision_layer,
        text_config=config.text if settings.text_shape else None,
        system=settings.system or None,
        bidirectional_images=config.bidirectional_images,
    )


def _check_folders(settings: Settings) -> None:
    """Of published shapes, only the numbers are here: weights and words are the user's to fetch."""
    missing = [
        f"{flag} DIR, the folder of {shapes[name].hub or name}"
        for flag, name, shapes in (
            ("--vision", settings.vision, EYES),
            ("--text", settings.text, VOICES),
        )
        if name in shapes and not Path(name).exists()
    ]
    if settings.text_shape and not settings.text:
        missing.append("--text DIR, a folder with a tokenizer, such as LLaMA's tokenizer.model")
    if missing:
        raise NanoVLMError(
            f"only shapes are named here, without weights; fetch and give {', and '.join(missing)}; "
            "or add --tiny to a preset, which needs none"
        )
    if not settings.vision or not settings.text:
        raise NanoVLMError("nothing to start from; give --init, or --vision and --text")


def planned_config(settings: Settings) -> VLMConfig:
    """All shapes of the model that `settings` join: of folders, of which only the `config.json` is read, or of published
    shapes by name."""
    vision = (
        EYES[settings.vision].vision
        if settings.vision in EYES
        else _of_folder(VisionConfig, settings.vision, "--vision", EYES)
    )
    name = settings.text_shape or settings.text
    text = (
        VOICES[name].text
        if name in VOICES
        else _of_folder(
            DecoderConfig, name, "--text-shape" if settings.text_shape else "--text", VOICES
        )
    )
    chat = (
        VOICES[name].chat if name in VOICES else ChatConfig()
    )  # of a folder, the tokenizer decides once it is read
    return VLMConfig(
        vision,
        text,
        *projector_and_image(settings),
        chat,
        settings.vision_layer,
        settings.bidirectional_images,
    )


def projector_and_image(settings: Settings) -> tuple[ProjectorConfig, ImageConfig]:
    """What joins eyes and voice, and how the eyes are shown an image: as their folder says, where it says so."""
    processor = read_processor(Path(settings.vision)) if settings.vision else None
    if processor is not None:
        image = ImageConfig.from_hf(processor)
    else:
        image = EYES[settings.vision].image if settings.vision in EYES else ImageConfig()
    if (
        image.fit == "crop"
    ):  # which might cut off what is asked about: the whole picture is squashed into the square
        image = dataclasses.replace(image, fit="squash", shortest_edge=None)
    image = dataclasses.replace(
        image, height=settings.image_size or image.height, width=settings.image_size or image.width
    )
    if settings.tiles:
        cuts = settings.tiles > 1
        image = dataclasses.replace(
            image, fit="tiles" if cuts else "squash", max_tiles=settings.tiles if cuts else None
        )
    return ProjectorConfig(
        settings.projector,
        settings.grid,
        settings.scale,
        settings.projector_activation,
        settings.projector_bias,
        settings.num_queries,
    ), image


def _of_folder(config_class: Any, folder: str, flag: str, shapes: Mapping[str, Any]) -> Any:
    path = Path(folder) / "config.json"
    if not path.exists():
        known = f"one of {', '.join(shapes)}"
        raise NanoVLMError(
            f"{flag} {folder}: is no folder with a config.json; give one, or {known}"
            if folder
            else f"{flag} is missing; give a folder with a config.json, or {known}"
        )
    try:
        return config_class.from_hf(read_json(path))
    except NanoVLMError as error:
        raise NanoVLMError(f"{folder}: {error}") from None


def set_up(model: VisionLanguageModel, settings: Settings, device: torch.device) -> None:
    """Quantise, adapt and freeze what `settings` name. What is quantised moves to `device`, the rest stays where it is."""
    if settings.quantize:
        quantize_(model.decoder.blocks, settings.quantize, device)
    if settings.lora_rank:
        add_adapters(model.decoder, LoRAConfig.from_settings(settings))
    freeze(model, settings)
