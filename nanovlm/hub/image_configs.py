"""The `preprocessor_config.json` of each image processor → `ImageConfig`."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from nanovlm.errors import NanoVLMError, quoted
from nanovlm.hub.config_json import UNKNOWN, is_harmless, read_config, require
from nanovlm.hub.vision_configs import parse_vision_encoder_config
from nanovlm.inputs.image_config import FILTERS, ImageConfig
from nanovlm.utils.config import check, from_dict, unknown_key
from nanovlm.utils.files import read_json

_FILE = "preprocessor_config.json"
_check = partial(check, where=_FILE)

# Settings of which one value is implemented, the default of all processors.
_FIXED = {
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_convert_rgb": True,
}

# The defaults of each processor, for what its files omit.
_CLIP_DEFAULTS: dict[str, Any] = {
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": 224,
    "do_pad": False,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_VIT_DEFAULTS: dict[str, Any] = {
    "size": {"height": 224, "width": 224},
    "resample": 2,
    "do_center_crop": False,
    "crop_size": 224,
    "do_pad": False,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}
_IDEFICS3_DEFAULTS: dict[str, Any] = {
    "size": {"longest_edge": 4 * 364},
    "resample": 1,
    "do_image_splitting": True,
    "max_image_size": {"longest_edge": 364},
    "do_pad": True,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}
_DEFAULTS = {
    "BitImageProcessor": _CLIP_DEFAULTS,
    "CLIPImageProcessor": _CLIP_DEFAULTS,
    "ViTImageProcessor": _VIT_DEFAULTS,
    "LlavaImageProcessor": _CLIP_DEFAULTS,
    "SiglipImageProcessor": _VIT_DEFAULTS | {"resample": 3},
    "Idefics3ImageProcessor": _IDEFICS3_DEFAULTS,
    "SmolVLMImageProcessor": _IDEFICS3_DEFAULTS,
}

# Keys that cannot change a pixel: names, what is returned beside the pixels, how videos are read.
_IGNORED = (
    "image_processor_type", "feature_extractor_type", "processor_class", "_valid_processor_keys",
    "return_row_col_info", "video_sampling", "data_format", "default_to_square", "device",
    "disable_grouping", "input_data_format", "return_tensors",
)  # fmt: skip

_LONGEST_EDGE = 4096  # pixels; the reference makes no image longer than this


def parse_image_config(config: dict[str, Any]) -> ImageConfig:
    """Parse the hub settings of a Bit (DINOv2), CLIP, ViT, SigLIP, Idefics3 or SmolVLM processor.

    Omitted settings take that processor's documented defaults. A setting that is not implemented
    and an unknown key are errors.
    """
    _check(isinstance(config, dict), f"expected a table of settings, found {type(config).__name__}")
    # The second name is the older one.
    processor = str(config.get("image_processor_type") or config.get("feature_extractor_type"))
    processor = processor.removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
    _check(
        processor in _DEFAULTS,
        f"image_processor_type is {processor:.80}; can read {', '.join(_DEFAULTS)}",
    )
    return _parse(config, processor)


def _parse(config: Mapping[str, Any], processor: str) -> ImageConfig:
    known = _FIXED | _DEFAULTS[processor]
    # Newer files list the settings of all processors, null where they are not this one's.
    given = {key: value for key, value in config.items() if value is not None}
    for key, value in given.items():
        if key not in known and key not in _IGNORED and not is_harmless(key, value):
            raise unknown_key(key, (*known, *_IGNORED), _FILE, UNKNOWN)
    settings = known | given

    require(settings, _FILE, **_FIXED)
    resample = _resample(settings["resample"])
    cuts_tiles = "do_image_splitting" in known
    fit = _fit_tiles(settings) if cuts_tiles else _fit_whole(settings, processor)
    fields = {"resample": resample, "mean": settings["image_mean"], "std": settings["image_std"]}
    return from_dict(ImageConfig, fields | fit, _FILE)


def read_image_config(folder: Path) -> ImageConfig:
    """How images are prepared for the vision encoder of a hub folder.

    Its processor says so. Where it holds none, images are prepared as its family's are: with the
    defaults of the family's processor, such as mean and standard deviation, and of the size that
    the encoder is made for (DINOv2, whose position table is for larger ones: 224).
    """
    processor = read_processor(folder)
    if processor is None:
        return _config_of_family(folder)
    try:
        return parse_image_config(processor)
    except NanoVLMError as error:
        raise NanoVLMError(f"{folder}: {error}") from None


def _config_of_family(folder: Path) -> ImageConfig:
    model_type, encoder = read_config(folder, parse_vision_encoder_config)
    side = encoder.image_size
    if model_type.startswith("dinov2"):
        return ImageConfig()
    if model_type == "qwen_vl_vision":
        clip = {name: _CLIP_DEFAULTS[name] for name in ("image_mean", "image_std", "resample")}
        # The side of the images, not the one of the position table.
        size = read_json(folder / "config.json").get("image_size")
        return _parse(clip | {"size": 448 if size is None else size}, "ViTImageProcessor")
    if model_type.startswith(("smolvlm", "idefics3")):
        tiles = {"size": {"longest_edge": 4 * side}, "max_image_size": {"longest_edge": side}}
        return _parse(tiles, "SmolVLMImageProcessor")
    processor = "CLIPImageProcessor" if model_type.startswith("clip") else "SiglipImageProcessor"
    square = {"height": side, "width": side}
    return _parse({"size": square, "crop_size": square}, processor)


def read_processor(folder: Path) -> dict[str, Any] | None:
    """The settings of a hub folder's image processor, for `parse_image_config`.

    They are in a file of their own or, in newer folders, within that of a processor of text and
    images. None where the folder has neither.
    """
    if (folder / _FILE).exists():
        return read_json(folder / _FILE)
    path = folder / "processor_config.json"
    nested = read_json(path).get("image_processor") if path.exists() else None
    return nested if isinstance(nested, dict) else None


def _resample(number: Any) -> str:
    """Our name of a filter, which hub files give by its number in Pillow."""
    for name, filter in FILTERS.items():
        if type(number) is int and filter == number:
            return name
    raise NanoVLMError(f"{_FILE}: resample = {quoted(number)} is not one of 0, 1, 2, 3")


def _fit_whole(settings: dict[str, Any], processor: str) -> dict[str, Any]:
    """The fields of `ImageConfig` for a processor that resizes or crops the whole image."""
    require(settings, _FILE, do_pad=False)
    size, crop, do_crop = settings["size"], settings["crop_size"], settings["do_center_crop"]
    if isinstance(size, int):  # in older files; what one number means depends on the processor
        square = processor == "ViTImageProcessor"
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    if _keys(size) == ["height", "width"] and (not do_crop or crop == size):
        return {"fit": "squash", **size}
    _check(
        do_crop and _keys(size) == ["shortest_edge"] and _keys(crop) == ["height", "width"],
        f"size {size} with do_center_crop {do_crop} and crop_size {crop} is not implemented",
    )
    return {"fit": "crop", **size, **crop}


def _keys(size: Any) -> list[str]:
    return sorted(size) if isinstance(size, dict) else []


def _fit_tiles(settings: dict[str, Any]) -> dict[str, Any]:
    """The fields of `ImageConfig` for a processor that cuts an image into tiles.

    `do_pad` makes no difference: it is about batches, not images.
    """
    require(settings, _FILE, do_image_splitting=True)
    size, tile = _longest_edge(settings["size"]), _longest_edge(settings["max_image_size"])
    _check(
        0 < tile < size <= _LONGEST_EDGE and size % tile == 0,
        f"size {settings['size']} with max_image_size {settings['max_image_size']} is not "
        "implemented, only a longest_edge that is a multiple of max_image_size's, and at most "
        f"{_LONGEST_EDGE}",
    )
    return {"fit": "tiles", "height": tile, "width": tile, "max_tiles": size // tile}


def _longest_edge(size: Any) -> int:
    """The number of `{"longest_edge": number}`; 0 for anything else."""
    edge = size.get("longest_edge") if isinstance(size, dict) and len(size) == 1 else None
    return edge if type(edge) is int else 0
