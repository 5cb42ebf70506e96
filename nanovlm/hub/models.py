"""Model folders: load and save our own models, load the parts that other people publish, join parts
to a new model."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanovlm.errors import NanoVLMError
from nanovlm.hub.chat_configs import read_chat_config
from nanovlm.hub.families import LANGUAGE_FAMILIES, OWN, VISION_FAMILIES, Family
from nanovlm.hub.language_configs import parse_language_model_config
from nanovlm.hub.loading import load_into, open_checkpoint
from nanovlm.hub.safetensors import Deferred, save_file
from nanovlm.hub.vision_configs import parse_vision_encoder_config
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.model.language_model import LanguageModel, LanguageModelConfig
from nanovlm.model.projector import ProjectorConfig, build_projector
from nanovlm.model.vision_encoder import VisionEncoder
from nanovlm.model.vlm import VisionLanguageModel, VLMConfig
from nanovlm.tokenizer import load_tokenizer
from nanovlm.utils.config import from_dict
from nanovlm.utils.files import read_json, write_json


def load_vision_encoder(folder: str | Path, dtype: torch.dtype | None = None) -> VisionEncoder:
    """Load a published folder (`config.json`, `model.safetensors` or shards) of DINOv2, SigLIP,
    CLIP, SmolVLM2 or Qwen-VL.

    Of a whole model's folder, only the vision encoder is read. `dtype` is that of the weights; None
    keeps the file's. Any missing, unexpected or mis-shaped tensor is an error.
    """
    return _load_part(VisionEncoder, parse_vision_encoder_config, folder, VISION_FAMILIES, dtype)


def load_language_model(folder: str | Path, dtype: torch.dtype | None = None) -> LanguageModel:
    """Load a published folder of Qwen, LLaMA, SmolLM2 or Mistral, or one that `save_language_model`
    wrote.

    `dtype` is that of the weights; None keeps the file's. Any missing, unexpected or mis-shaped
    tensor is an error.
    """
    return _load_part(LanguageModel, parse_language_model_config, folder, LANGUAGE_FAMILIES, dtype)


def save_language_model(model: LanguageModel, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors` under our own names, for `load_language_model`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"model_type": OWN, **dataclasses.asdict(model.config)})
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def load_model(folder: str | Path, dtype: torch.dtype | None = None) -> VisionLanguageModel:
    """Load a model folder (`config.json`, `model.safetensors`, tokenizer files), in evaluation
    mode.

    Loading is strict, and no weight is held twice. `dtype` is that of the weights; None keeps the
    file's.
    """
    folder = Path(folder)
    try:
        config = parse_model_config(read_json(folder / "config.json"))
    except NanoVLMError as error:
        raise NanoVLMError(f"{folder}: {error}") from None
    tokenizer = load_tokenizer(folder)
    with torch.device("meta"):
        model = VisionLanguageModel(config, tokenizer)
    load_into(model, open_checkpoint(folder), lambda name: name, dtype=dtype)
    return model.eval()


def save_model(
    model: VisionLanguageModel,
    folder: str | Path,
    tensors: Mapping[str, Tensor | Deferred] | None = None,
) -> None:
    """Write a complete model folder, with `tensors` in place of the model's own where they are
    given.

    The weights are written last, so a folder that has them is complete.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "nanovlm", **dataclasses.asdict(model.config)}
    write_json(folder / "config.json", config)
    model.tokenizer.save(folder)
    save_file(
        model.state_dict() if tensors is None else tensors,
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def join_parts(
    vision_encoder: str | Path,
    language_model: str | Path,
    projector: ProjectorConfig,
    image: ImageConfig,
    vision_layer: int = -1,
    *,
    bidirectional_images: bool = False,
    language_config: LanguageModelConfig | None = None,
    system: str | None = None,
) -> VisionLanguageModel:
    """Join a pretrained vision encoder and a pretrained language model (two published folders) with
    a new projector.

    With `language_config` the language model is new, too, and its folder gives the tokenizer alone.
    `system` is the prompt of conversations that bring none: the published default introduces a
    model without a vision encoder.
    """
    encoder, tokenizer = load_vision_encoder(vision_encoder), load_tokenizer(language_model)
    chat = dataclasses.replace(read_chat_config(language_model, tokenizer), default_system=system)
    tokenizer.add_special_token(chat.image_token)
    if language_config is None:
        language = load_language_model(language_model)
    else:
        rows = max(language_config.vocab_size, tokenizer.vocab_size)
        language = LanguageModel(dataclasses.replace(language_config, vocab_size=rows))
    config = VLMConfig(
        encoder.config, language.config, projector, image, chat, vision_layer, bidirectional_images
    )
    with torch.device("meta"):
        model = VisionLanguageModel(config, tokenizer)
    model.vision_encoder, model.language_model = encoder, language
    model.projector = build_projector(
        projector, encoder.config.feature_size(vision_layer), language.config.input_size
    )
    return model


def parse_model_config(config: dict[str, Any]) -> VLMConfig:
    """Read the `config.json` that `save_model` wrote; an unknown or missing key is an error that
    names it."""
    if config.get("model_type") != "nanovlm":
        raise NanoVLMError(
            f"config.json: model_type is {config.get('model_type')!r}, expected 'nanovlm'; "
            "give the folder of a trained model, such as runs/stage2/model"
        )
    settings = {key: value for key, value in config.items() if key != "model_type"}
    return from_dict(VLMConfig, settings, where="config.json")


def _load_part(
    model_class: Any,
    parse_config: Any,
    folder: str | Path,
    families: Mapping[str, Family],
    dtype: torch.dtype | None,
) -> Any:
    """Build `model_class` from `folder`'s `config.json` and fill it with its tensors under the
    family's names.

    The module is laid out without memory, then each parameter becomes the file's own tensor, cast
    once if `dtype` differs: the weights are never held twice.
    """
    folder = Path(folder)
    published = read_json(folder / "config.json")
    try:
        config = parse_config(published)
    except NanoVLMError as error:
        raise NanoVLMError(f"{folder}: {error}") from None
    with torch.device("meta"):
        model: nn.Module = model_class(config)
    load_into(
        model,
        open_checkpoint(folder),
        families[published["model_type"]].names(config),
        dtype=dtype,
        tied=getattr(model, "tied_names", {}),
    )
    return model.eval()
