"""Whole models and their parts, from and to folders: load, save, join."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nanovlm.errors import NanoVLMError, quoted
from nanovlm.hub.chat_configs import read_chat_config
from nanovlm.hub.config_json import read_config, what_model
from nanovlm.hub.language_configs import parse_language_model_config
from nanovlm.hub.loading import load_into, open_checkpoint
from nanovlm.hub.names import LANGUAGE_FAMILIES, OWN, VISION_FAMILIES, Target, refuse_old_names
from nanovlm.hub.published.families import OTHERS, PUBLISHED, read_published
from nanovlm.hub.published.parts import Parts
from nanovlm.hub.safetensors import Deferred, save_file
from nanovlm.hub.shapes import find_model
from nanovlm.hub.vision_configs import parse_vision_encoder_config
from nanovlm.inputs.chat import tile_frame
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.model.language_model import LanguageModel, LanguageModelConfig
from nanovlm.model.projector import ProjectorConfig, build_projector
from nanovlm.model.vision_encoder import VisionEncoder
from nanovlm.model.vlm import VisionLanguageModel, VLMConfig
from nanovlm.tokenizer import Tokenizer, load_tokenizer
from nanovlm.utils.config import from_dict
from nanovlm.utils.device import check_memory
from nanovlm.utils.files import write_json

M = TypeVar("M", bound=nn.Module)


def load_model(
    folder: str | Path, dtype: torch.dtype | None = None, *, aligned: bool = True
) -> VisionLanguageModel:
    """Load a model folder (`config.json`, weights, tokenizer files), in eval mode.

    It is one that `save_model` wrote, or a published folder of SmolVLM, Idefics3 or LLaVA.

    Loading is strict: any missing, unexpected or mis-shaped tensor is an error. No weight is held
    twice. `dtype` is that of the weights; None keeps the file's. `aligned` as in `load_into`.
    """
    folder = find_model(folder)
    model_type, parsed = read_config(folder, _parse)
    tokenizer = load_tokenizer(folder)
    config, name_map = _joined(folder, model_type, parsed, tokenizer)
    with torch.device("meta"):
        model = VisionLanguageModel(config, tokenizer)
    checkpoint = open_checkpoint(folder)
    if model_type not in PUBLISHED:
        refuse_old_names(checkpoint.keys(), checkpoint.path)
    tied = {
        f"language_model.{name}": f"language_model.{same}"
        for name, same in model.language_model.tied_names.items()
    }
    load_into(model, checkpoint, name_map, dtype=dtype, tied=tied, aligned=aligned)
    return model.eval()


def read_model_config(folder: str | Path) -> VLMConfig:
    """The settings of a folder that `load_model` reads, without its weights."""
    folder = find_model(folder)
    model_type, parsed = read_config(folder, _parse)
    if isinstance(parsed, VLMConfig):
        return parsed
    return _joined(folder, model_type, parsed, load_tokenizer(folder))[0]


def _parse(config: dict[str, Any]) -> VLMConfig | Parts:
    """Parse the `config.json` of a whole model, ours or a published one."""
    family = PUBLISHED.get(str(config.get("model_type")))
    return family.parse(config) if family else parse_model_config(config)


def _joined(
    folder: Path, model_type: str, parsed: VLMConfig | Parts, tokenizer: Tokenizer
) -> tuple[VLMConfig, Callable[[str], Target]]:
    """A model's settings, and the function from its tensors' names to ours."""
    if isinstance(parsed, VLMConfig):
        return parsed, lambda name: name
    family = PUBLISHED[model_type]
    return read_published(folder, family, parsed, tokenizer), family.name_map(parsed)


def save_model(
    model: VisionLanguageModel,
    folder: str | Path,
    tensors: Mapping[str, Tensor | Deferred] | None = None,
) -> None:
    """Write a complete model folder.

    `tensors`, where given, are written in place of the model's own. The weights are written last,
    so a folder that has them is complete.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "nanovlm", **dataclasses.asdict(model.config)}
    write_json(folder / "config.json", config)
    model.tokenizer.save(folder)
    weights = model.state_dict() if tensors is None else tensors
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load_vision_encoder(folder: str | Path, dtype: torch.dtype | None = None) -> VisionEncoder:
    """Load a published folder of DINOv2, SigLIP, CLIP, SmolVLM2 or Qwen-VL, in eval mode.

    The folder has a `config.json` and a `model.safetensors` or shards. Of a whole model's folder,
    only the vision encoder is read. `dtype` is that of the weights; None keeps the file's. Any
    missing, unexpected or mis-shaped tensor is an error.
    """
    folder = Path(folder)
    model_type, config = read_config(folder, parse_vision_encoder_config)
    with torch.device("meta"):
        model = VisionEncoder(config)
    name_map = VISION_FAMILIES[model_type].names(config)
    load_into(model, open_checkpoint(folder), name_map, dtype=dtype)
    return model.eval()


def load_language_model(folder: str | Path, dtype: torch.dtype | None = None) -> LanguageModel:
    """Load a published folder of Qwen, LLaMA, SmolLM2 or Mistral, or one of ours, in eval mode.

    Ours are those that `save_language_model` wrote. `dtype` is that of the weights; None keeps the
    file's. Any missing, unexpected or mis-shaped tensor is an error.
    """
    folder = Path(folder)
    model_type, config = read_config(folder, parse_language_model_config)
    with torch.device("meta"):
        model = LanguageModel(config)
    name_map = LANGUAGE_FAMILIES[model_type].names(config)
    load_into(model, open_checkpoint(folder), name_map, dtype=dtype, tied=model.tied_names)
    return model.eval()


def save_language_model(model: LanguageModel, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors` with our names, for `load_language_model`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"model_type": OWN, **dataclasses.asdict(model.config)})
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def join_parts(  # noqa: PLR0913 - two folders, then settings that callers name as they need them
    vision_encoder: str | Path,
    language_model: str | Path,
    projector: ProjectorConfig,
    image: ImageConfig,
    vision_layer: int = -1,
    *,
    vision_norm: bool = True,
    bidirectional_images: bool = False,
    language_config: LanguageModelConfig | None = None,
    system: str | None = None,
) -> VisionLanguageModel:
    """Join a published vision encoder and a published language model with a new projector.

    vision_encoder, language_model: their folders.
    projector, image, vision_layer, vision_norm, bidirectional_images: as in `VLMConfig`.
    language_config: the shape of a new language model; the folder then gives the tokenizer alone.
    system: the system prompt of conversations without one, in place of the published default,
        which introduces a model without a vision encoder.
    """
    encoder, tokenizer = load_vision_encoder(vision_encoder), load_tokenizer(language_model)
    chat = dataclasses.replace(read_chat_config(language_model, tokenizer), default_system=system)
    tokenizer.add_special_token(chat.image_token)
    before, after = tile_frame(tokenizer)
    if image.max_tiles is not None and before != after:
        # As SmolVLM's processor writes images, which knows one token for both ends.
        chat = dataclasses.replace(chat, tile_end=before)
    if language_config is None:
        language = load_language_model(language_model)
    else:
        rows = max(language_config.vocab_size, tokenizer.vocab_size)
        shape = dataclasses.replace(language_config, vocab_size=rows)
        language = _new(lambda: LanguageModel(shape))
    config = VLMConfig(
        vision_encoder=encoder.config,
        language_model=language.config,
        projector=projector,
        image=image,
        chat=chat,
        vision_layer=vision_layer,
        vision_norm=vision_norm,
        bidirectional_images=bidirectional_images,
    )
    with torch.device("meta"):
        model = VisionLanguageModel(config, tokenizer)
    _, vision_width = config.feature_shape
    model.vision_encoder, model.language_model = encoder, language
    width = language.config.input_size
    model.projector = _new(lambda: build_projector(projector, vision_width, width))
    return model


def _new(build: Callable[[], M]) -> M:
    """A part with new weights; an error where the machine has no memory for them."""
    with torch.device("meta"):
        part = build()
    size = sum(parameter.nbytes for parameter in part.parameters())
    check_memory(size, f"the new {type(part).__name__}")
    return build()


def parse_model_config(config: dict[str, Any]) -> VLMConfig:
    """Parse the `config.json` that `save_model` wrote; an unknown or missing key is an error.

    An older file has no `vision_norm`: layer -1 was then after the final norm, any other before it.
    Nor has it a `vision_first_token`.
    """
    if (model_type := config.get("model_type")) != "nanovlm":
        if model_type in OTHERS:
            raise NanoVLMError(
                f"config.json: model_type is {quoted(model_type)}: {OTHERS[model_type]}; "
                f"of published models, {', '.join(PUBLISHED)} are read"
            )
        raise NanoVLMError(
            f"config.json: model_type is {quoted(model_type)}{what_model(config)}, "
            "expected 'nanovlm'; give the folder of a trained model, such as runs/stage2/model, "
            f"or of a published one ({', '.join(PUBLISHED)})"
        )
    settings = {name: value for name, value in config.items() if name != "model_type"}
    settings.setdefault("vision_first_token", None)
    settings.setdefault("vision_norm", settings.get("vision_layer", -1) == -1)
    return from_dict(VLMConfig, settings, where="config.json")
