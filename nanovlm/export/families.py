"""The published form of a model: which class of `transformers` it is there, and its settings.

A model is a LLaVA, or, with a pixel shuffle and images in tiles, an Idefics3 or a SmolVLM. What has
no counterpart there is refused by name, with what would do instead.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from nanovlm.errors import NanoVLMError
from nanovlm.export.parts import LLAVA_VISION, Table, language_table, vision_table
from nanovlm.hub.published.llava import STRATEGIES
from nanovlm.inputs.image_config import FILTERS, ImageConfig
from nanovlm.model.vision_encoder import VisionEncoderConfig
from nanovlm.model.vlm import VisionLanguageModel, VLMConfig

# Tokens that `Idefics3Processor` knows by name, and adds to a tokenizer that lacks one.
IDEFICS3_TOKENS = {"<fake_token_around_image>", "<image>", "<end_of_utterance>"}


@dataclass(frozen=True)
class Form:
    """A model as `transformers` has it.

    family: its model_type. config: of `config.json`. image_processor, processor: of
    `preprocessor_config.json` and `processor_config.json`. named_tokens: tokens that the processor
    asks its tokenizer for, by the name that it uses. has_new_row: whether the embedding table gets
    one for the placeholder.
    """

    family: str
    config: Table
    image_processor: Table
    processor: Table
    named_tokens: dict[str, str] = field(default_factory=dict)
    has_new_row: bool = False


def published_form(model: VisionLanguageModel) -> Form:
    """The form of `model`; NanoVLMError for one that has none."""
    config = model.config
    if config.bidirectional_images:
        raise _refusal(
            "lets the visual tokens of an image attend to each other both ways "
            "(bidirectional_images)",
            "one trained without --bidirectional-images",
        )
    kind = config.projector.kind
    if kind in ("linear", "mlp"):
        return _llava(model)
    if kind == "pixel_shuffle":
        return _idefics3(model)
    raise _refusal(
        f"has the projector {kind}",
        "one with the projector linear or mlp (LLaVA), or with pixel_shuffle and images in tiles "
        "(SmolVLM)",
    )


def _llava(model: VisionLanguageModel) -> Form:
    config = model.config
    vision, image, projector = config.vision_encoder, config.image, config.projector
    if config.vision_norm and vision.final_norm:
        raise _refusal(
            "gives its projector the last layer after the final norm (vision_norm), which LLaVA "
            "takes before",
            "one trained with --no-vision-norm",
        )
    if image.max_tiles is not None:
        raise _refusal(
            f"cuts images into tiles for the projector {projector.kind}",
            "one whose images are not cut, or with the projector pixel_shuffle (SmolVLM)",
        )
    prefix, first = vision.num_prefix_tokens, config.vision_first_token
    first = prefix if first is None else first
    if first not in STRATEGIES:
        raise _refusal(
            f"leaves out the first {first} tokens of its vision encoder (class token and "
            "registers), of which LLaVA leaves out one or none",
            "one with a vision encoder without registers",
        )
    table = vision_table(_for_images(vision, image), LLAVA_VISION)
    strategy = STRATEGIES[first]
    settings = {
        "vision_feature_layer": config.vision_layer,
        "vision_feature_select_strategy": strategy,
        "projector_hidden_act": "linear" if projector.kind == "linear" else projector.activation,
        "multimodal_projector_bias": projector.bias,
        "image_token_index": model.chat.image_token_id,
        "image_seq_length": model.image_length,
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": config.chat.image_token,
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": prefix,
        "vision_feature_select_strategy": strategy,
    }
    image_processor = _whole_images(image) | {"processor_class": "LlavaProcessor"}
    settings |= _common("Llava", table, model)
    return Form("llava", settings, image_processor, processor, has_new_row=_needs_row(model))


def _idefics3(model: VisionLanguageModel) -> Form:
    config = model.config
    vision, image = config.vision_encoder, config.image
    before, after = model.chat.tile_frame
    _check_idefics3(config)
    if before != after or not before:
        raise _refusal(
            f"ends an image with {after!r}, where the processor of SmolVLM repeats {before!r}"
            if before
            else "has no token before a tile, where the processor of SmolVLM has one",
            "one that was joined by this version and has a Qwen tokenizer, or SmolVLM's own",
        )
    family, name = "smolvlm", "SmolVLM"
    named = {"image_token": config.chat.image_token, "fake_image_token": before}
    named["end_of_utterance_token"] = model.chat.template.end_of_turn["assistant"]
    # Its processor knows no other tokens, and needs fewer packages.
    special = model.tokenizer.special_tokens.keys()
    if special >= IDEFICS3_TOKENS and config.chat.image_token == "<image>":
        family, name, named = "idefics3", "Idefics3", {}
    table = vision_table(_for_images(vision, image), (f"{family}_vision",))
    settings = {
        "scale_factor": config.projector.scale,
        "image_token_id": model.chat.image_token_id,
        **_common(name, table, model),
    }
    processor = {"processor_class": f"{name}Processor", "image_seq_len": model.image_length}
    assert image.max_tiles is not None
    image_processor = _normalised(image) | {
        "image_processor_type": f"{name}ImageProcessor",
        "processor_class": f"{name}Processor",
        "do_image_splitting": True,
        "do_pad": True,
        "size": {"longest_edge": image.max_tiles * image.width},
        "max_image_size": {"longest_edge": image.width},
    }
    return Form(family, settings, image_processor, processor, named, _needs_row(model))


def _needs_row(model: VisionLanguageModel) -> bool:
    """Whether the embedding table has no row for the placeholder, which is looked up there."""
    return model.chat.image_token_id >= model.config.language_model.vocab_size


def _check_idefics3(config: VLMConfig) -> None:
    vision = config.vision_encoder
    if config.image.max_tiles is None:
        raise _refusal(
            "has the projector pixel_shuffle for images that are not cut into tiles, around which "
            "the processor of SmolVLM writes tokens",
            "one whose images are cut into tiles, or with the projector linear or mlp (LLaVA)",
        )
    if config.projector.bias:
        raise _refusal(
            "has a pixel shuffle with a bias (projector_bias)",
            "one trained with --no-projector-bias",
        )
    is_last = config.vision_depth == vision.num_hidden_layers
    if not (config.vision_norm and vision.final_norm and is_last):
        raise _refusal(
            "gives its pixel shuffle a layer of the vision encoder before the final norm, where "
            "SmolVLM takes the last one after it",
            "one trained with --vision-layer -1 --vision-norm",
        )
    if vision.num_prefix_tokens or config.vision_first_token:
        raise _refusal(
            "has a vision encoder with a class token or registers before its pixel shuffle",
            "one with SmolVLM's vision encoder or SigLIP",
        )


def _common(name: str, vision: Table, model: VisionLanguageModel) -> Table:
    """The settings that both families have."""
    text, chat = language_table(model.config.language_model), model.chat
    text["vocab_size"] += _needs_row(model)
    text["eos_token_id"] = chat.end_of_turn_id
    return {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": name.lower(),
        "vision_config": vision,
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
    }


def _for_images(vision: VisionEncoderConfig, image: ImageConfig) -> VisionEncoderConfig:
    """The vision encoder with its position table resized, where only one of that size is taken.

    DINOv2 resizes its table itself. Where images have the size of the table, how it would be
    resized does not matter.
    """
    if vision.layer_scale:
        return vision
    if image.height != image.width:
        raise _refusal(
            f"has images of {image.height}×{image.width} pixels, and its vision encoder takes "
            "square ones there",
            "one with square images, or with DINOv2,",
        )
    mode = "nearest" if image.max_tiles else "bicubic"
    return replace(vision, image_size=image.height, position_resize=mode)


def _whole_images(image: ImageConfig) -> Table:
    """The processor of images that are resized, or resized and cropped."""
    size = {"height": image.height, "width": image.width}
    if image.shortest_edge is None:
        kind, sizes = "SiglipImageProcessor", {"size": size}
    else:
        kind, sizes = "CLIPImageProcessor", {"size": {"shortest_edge": image.shortest_edge}}
        sizes |= {"do_center_crop": True, "crop_size": size}
    return {"image_processor_type": kind, **_normalised(image), **sizes}


def _normalised(image: ImageConfig) -> dict[str, Any]:
    steps: Iterable[str] = ("convert_rgb", "resize", "rescale", "normalize")
    return {
        **{f"do_{step}": True for step in steps},
        "resample": int(FILTERS[image.resample]),
        "rescale_factor": 1 / 255,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }


def _refusal(what: str, instead: str) -> NanoVLMError:
    return NanoVLMError(
        f"{what}, for which transformers has no counterpart; {instead} can be exported"
    )
