"""The model that a run starts from, and what is done to it before the first step."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from nanovlm.errors import NanoVLMError
from nanovlm.hub.config_json import read_config
from nanovlm.hub.image_configs import read_image_config, read_processor
from nanovlm.hub.language_configs import parse_language_model_config
from nanovlm.hub.models import join_parts, load_model
from nanovlm.hub.shapes import (
    LANGUAGE_MODELS,
    TOKENIZERS,
    VISION_ENCODERS,
    WEIGHTS,
    download_command,
)
from nanovlm.hub.toy import toy_model
from nanovlm.hub.vision_configs import parse_vision_encoder_config
from nanovlm.inputs.chat import ChatConfig
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.model.lora import LoRAConfig, add_adapters
from nanovlm.model.projector import ProjectorConfig
from nanovlm.model.quantization import quantize_
from nanovlm.model.vlm import VisionLanguageModel, VLMConfig
from nanovlm.training.freezing import freeze
from nanovlm.training.objectives.words import add_scale
from nanovlm.training.settings import ModelSettings, Settings
from nanovlm.utils.console import say
from nanovlm.utils.parser import flag

# Above this width a language model is pretrained, or at least not of a toy.
PRETRAINED_WIDTH, TOO_FAST = 512, 5e-4
OF_OBJECTIVE = {  # settings that one objective alone reads
    "dpo": ("beta", "label_smoothing", "sft_weight"),
    "words": ("word_images", "max_words"),
}


def build_model(settings: Settings) -> VisionLanguageModel:
    """The model a run starts from.

    A whole one (`--init`), a vision encoder and a language model joined by a new projector, or all
    of it at toy widths (`--tiny`).
    """
    _say_what_is_unused(settings)
    if settings.init:
        model = load_model(settings.init)
        _say_if_too_fast(model, settings)
        return model
    if settings.objective == "dpo":
        raise NanoVLMError(
            "--objective dpo makes a trained model better and needs one to start from; give --init"
        )
    if settings.tiny:
        return toy_model(planned_config(settings))
    _check_folders(settings)
    config = planned_config(settings)
    if read_processor(Path(settings.vision_encoder)) is None:
        known = settings.vision_encoder in VISION_ENCODERS
        say(
            f"{settings.vision_encoder}: holds no preprocessor_config.json; images are prepared as "
            f"for {settings.vision_encoder if known else 'its family'}, "
            f"{config.image.width}×{config.image.height} pixels"
        )
    return join_parts(
        settings.vision_encoder,
        settings.language_model,
        config.projector,
        config.image,
        config.vision_layer,
        vision_norm=config.vision_norm,
        language_config=config.language_model if settings.language_model_shape else None,
        system=settings.system or None,
        bidirectional_images=config.bidirectional_images,
    )


def set_up(model: VisionLanguageModel, settings: Settings, device: torch.device) -> None:
    """Quantise, adapt and freeze what `settings` name. Quantised matrices move to `device`."""
    if settings.quantize:
        quantize_(model.language_model.blocks, settings.quantize, device)
    if settings.lora_rank:
        add_adapters(model.language_model, lora_config(settings))
    if settings.objective == "words":
        add_scale(model)
    freeze(model, settings)


def lora_config(settings: Settings) -> LoRAConfig:
    """The adapters that `settings` name, for the language model that the run starts from."""
    return LoRAConfig(
        rank=settings.lora_rank,
        alpha=settings.lora_alpha or 2.0 * settings.lora_rank,
        targets=settings.lora_targets,
        dropout=settings.lora_dropout,
        layers=settings.language_model_layers,
        base_model=settings.init or f"{settings.vision_encoder} + {settings.language_model}",
    )


def planned_config(settings: ModelSettings) -> VLMConfig:
    """All shapes of the model that `settings` join.

    They are of folders, of which only `config.json` is read, or of published shapes by name.
    """
    if settings.vision_encoder in VISION_ENCODERS:
        vision_encoder = VISION_ENCODERS[settings.vision_encoder].vision_encoder
    else:
        vision_encoder = _read_config(
            parse_vision_encoder_config,
            settings.vision_encoder,
            "--vision-encoder",
            VISION_ENCODERS,
        )
    name = settings.language_model_shape or settings.language_model
    if name in LANGUAGE_MODELS:
        language_model, chat = LANGUAGE_MODELS[name].language_model, LANGUAGE_MODELS[name].chat
    else:
        given = "--language-model-shape" if settings.language_model_shape else "--language-model"
        language_model = _read_config(parse_language_model_config, name, given, LANGUAGE_MODELS)
        chat = ChatConfig()  # the folder's tokenizer decides, once it is read
    return VLMConfig(
        vision_encoder,
        language_model,
        *projector_and_image(settings),
        chat,
        settings.vision_layer,
        settings.vision_norm,
        settings.bidirectional_images,
    )


def projector_and_image(settings: ModelSettings) -> tuple[ProjectorConfig, ImageConfig]:
    """The projector, and how images are prepared: as the vision encoder's folder says, if it does.

    Where that one crops, which might cut off what is asked about, the whole image is resized.
    """
    folder = Path(settings.vision_encoder)
    if settings.vision_encoder in VISION_ENCODERS and read_processor(folder) is None:
        image = VISION_ENCODERS[settings.vision_encoder].image
    else:
        image = read_image_config(folder) if settings.vision_encoder else ImageConfig()
    if image.fit == "crop":
        image = dataclasses.replace(image, fit="squash", shortest_edge=None)
    image = dataclasses.replace(
        image, height=settings.image_size or image.height, width=settings.image_size or image.width
    )
    if settings.tiles == 1:
        image = dataclasses.replace(image, fit="squash", max_tiles=None)
    elif settings.tiles:
        image = dataclasses.replace(image, fit="tiles", max_tiles=settings.tiles)
    projector = ProjectorConfig(
        settings.projector,
        settings.grid,
        settings.scale,
        settings.projector_activation,
        settings.projector_bias,
        settings.num_queries,
    )
    return projector, image


def _say_what_is_unused(settings: Settings) -> None:
    """Name the settings of a new model given beside a whole one, and those of other objectives."""

    def flags(names: Iterable[str]) -> str:
        default = Settings()
        return ", ".join(
            flag(name) for name in names if getattr(settings, name) != getattr(default, name)
        )

    of_a_new_model = (field.name for field in dataclasses.fields(ModelSettings))
    unused = flags(name for name in of_a_new_model if name not in ("init", "tiny"))
    if settings.init and unused:
        say(f"--init {settings.init} is a whole model, so these have no effect: {unused}")
    for objective, names in OF_OBJECTIVE.items():
        if objective != settings.objective and (unused := flags(names)):
            say(
                f"--objective is {settings.objective}, "
                f"so these of {objective} have no effect: {unused}"
            )


def _say_if_too_fast(model: VisionLanguageModel, settings: Settings) -> None:
    """Say so where a pretrained language model is to take the steps of a small one from scratch.

    That is so with the default preset, whose rates are those of the toy world.
    """
    rate = settings.lr_language_model or settings.lr
    width = model.config.language_model.hidden_size
    trained = "language_model" in settings.trained_parts and not settings.lora_rank
    if trained and width >= PRETRAINED_WIDTH and rate >= TOO_FAST:
        say(
            f"--init {settings.init}: its language model is {width} wide and would be trained at a "
            f"rate of {rate:g}, at which pretrained weights forget what they know; take "
            "--lr-language-model 2e-5, or a preset for pretrained weights"
        )


def _check_folders(settings: ModelSettings) -> None:
    """Refuse names without folders: weights and tokenizers are for the user to fetch."""
    given = {
        "--vision-encoder": settings.vision_encoder,
        "--language-model": settings.language_model,
    }
    names = VISION_ENCODERS.keys() | LANGUAGE_MODELS.keys() | TOKENIZERS.keys()
    missing = {
        part: name for part, name in given.items() if name in names and not Path(name).exists()
    }
    for part, name in missing.items():
        if name in LANGUAGE_MODELS and not LANGUAGE_MODELS[name].hub:
            raise NanoVLMError(
                f"{name} is a shape that nobody publishes; give {part} DIR, a folder"
            )
    if missing:
        raise NanoVLMError(
            f"{' and '.join(str(WEIGHTS / name) for name in missing.values())}: not there yet; "
            f"fetch with {download_command(missing.values())}, or give a folder with "
            f"{' and '.join(missing)}, or add --tiny to a preset, which needs none"
        )
    if settings.language_model_shape and not settings.language_model:
        raise NanoVLMError(
            "--language-model is missing, which gives the tokenizer; name a folder with one, or "
            f"llama-tokenizer, which {download_command(TOKENIZERS)} fetches"
        )
    if not settings.vision_encoder or not settings.language_model:
        raise NanoVLMError(
            "nothing to start from; give --init, or --vision-encoder and --language-model"
        )


def _read_config(
    parse: Callable[[dict], Any], folder: str, name: str, shapes: Mapping[str, Any]
) -> Any:
    if not folder or not Path(folder).exists():
        known = f"one of {', '.join(shapes)}"
        raise NanoVLMError(
            f"{name} {folder}: is no folder with a config.json; give one, or {known}"
            if folder
            else f"{name} is missing; give a folder with a config.json, or {known}"
        )
    _, config = read_config(Path(folder), parse)
    return config
