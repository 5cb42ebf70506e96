"""The model that a run starts from, and what a run makes of it before the first step."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from nanovlm.errors import NanoVLMError
from nanovlm.hub.image_configs import parse_image_config, read_processor
from nanovlm.hub.language_configs import parse_language_model_config
from nanovlm.hub.models import join_parts, load_model
from nanovlm.hub.shapes import LANGUAGE_MODELS, VISION_ENCODERS
from nanovlm.hub.toy import toy_model
from nanovlm.hub.vision_configs import parse_vision_encoder_config
from nanovlm.inputs.chat import ChatConfig
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.model.lora import LoRAConfig, add_adapters
from nanovlm.model.projector import ProjectorConfig
from nanovlm.model.quantization import quantize_
from nanovlm.model.vlm import VisionLanguageModel, VLMConfig
from nanovlm.training.freezing import freeze
from nanovlm.training.settings import Settings
from nanovlm.utils.console import say
from nanovlm.utils.files import read_json


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
        return load_model(settings.init)
    if settings.objective == "dpo":
        raise NanoVLMError(
            "--objective dpo makes a trained model better and needs one to start from; give --init"
        )
    if settings.tiny:
        return toy_model(planned_config(settings))
    _check_folders(settings)
    config = planned_config(settings)
    if read_processor(Path(settings.vision_encoder)) is None:
        say(
            f"{settings.vision_encoder}: holds no preprocessor_config.json; images are prepared as for "
            + (settings.vision_encoder if settings.vision_encoder in VISION_ENCODERS else "DINOv2")
            + f", {config.image.width}×{config.image.height} pixels"
        )
    return join_parts(
        settings.vision_encoder,
        settings.language_model,
        config.projector,
        config.image,
        config.vision_layer,
        language_config=config.language_model if settings.language_model_shape else None,
        system=settings.system or None,
        bidirectional_images=config.bidirectional_images,
    )


def _check_folders(settings: Settings) -> None:
    """Of published shapes, only the numbers are here: weights and words are the user's to fetch."""
    missing = [
        f"{flag} DIR, the folder of {shapes[name].hub or name}"
        for flag, name, shapes in (
            ("--vision-encoder", settings.vision_encoder, VISION_ENCODERS),
            ("--language-model", settings.language_model, LANGUAGE_MODELS),
        )
        if name in shapes and not Path(name).exists()
    ]
    if settings.language_model_shape and not settings.language_model:
        missing.append(
            "--language-model DIR, a folder with a tokenizer, such as LLaMA's tokenizer.model"
        )
    if missing:
        raise NanoVLMError(
            f"only shapes are named here, without weights; fetch and give {', and '.join(missing)}; "
            "or add --tiny to a preset, which needs none"
        )
    if not settings.vision_encoder or not settings.language_model:
        raise NanoVLMError(
            "nothing to start from; give --init, or --vision-encoder and --language-model"
        )


def planned_config(settings: Settings) -> VLMConfig:
    """All shapes of the model that `settings` join: of folders, of which only the `config.json` is read, or of published
    shapes by name."""
    vision = (
        VISION_ENCODERS[settings.vision_encoder].vision_encoder
        if settings.vision_encoder in VISION_ENCODERS
        else _of_folder(
            parse_vision_encoder_config,
            settings.vision_encoder,
            "--vision-encoder",
            VISION_ENCODERS,
        )
    )
    name = settings.language_model_shape or settings.language_model
    text = (
        LANGUAGE_MODELS[name].language_model
        if name in LANGUAGE_MODELS
        else _of_folder(
            parse_language_model_config,
            name,
            "--language-model-shape" if settings.language_model_shape else "--language-model",
            LANGUAGE_MODELS,
        )
    )
    chat = (
        LANGUAGE_MODELS[name].chat if name in LANGUAGE_MODELS else ChatConfig()
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
    processor = read_processor(Path(settings.vision_encoder)) if settings.vision_encoder else None
    if processor is not None:
        image = parse_image_config(processor)
    else:
        image = (
            VISION_ENCODERS[settings.vision_encoder].image
            if settings.vision_encoder in VISION_ENCODERS
            else ImageConfig()
        )
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


def _of_folder(
    parse: Callable[[dict], Any], folder: str, flag: str, shapes: Mapping[str, Any]
) -> Any:
    path = Path(folder) / "config.json"
    if not path.exists():
        known = f"one of {', '.join(shapes)}"
        raise NanoVLMError(
            f"{flag} {folder}: is no folder with a config.json; give one, or {known}"
            if folder
            else f"{flag} is missing; give a folder with a config.json, or {known}"
        )
    try:
        return parse(read_json(path))
    except NanoVLMError as error:
        raise NanoVLMError(f"{folder}: {error}") from None


def set_up(model: VisionLanguageModel, settings: Settings, device: torch.device) -> None:
    """Quantise, adapt and freeze what `settings` name. What is quantised moves to `device`, the rest stays where it is."""
    if settings.quantize:
        quantize_(model.language_model.blocks, settings.quantize, device)
    if settings.lora_rank:
        add_adapters(model.language_model, LoRAConfig.from_settings(settings))
    freeze(model, settings)
