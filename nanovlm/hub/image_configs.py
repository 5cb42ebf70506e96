"""How published models prepare an image: `preprocessor_config.json` of every family →
`ImageConfig`."""

from pathlib import Path
from typing import Any

from nanovlm.hub.config_json import require
from nanovlm.inputs.image_config import FILTERS, ImageConfig
from nanovlm.utils.config import check, unknown_key
from nanovlm.utils.files import read_json

# Hub settings with one implemented value, which is also the default; then what each processor
# leaves out of its file.
_HUB_FIXED = {
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_convert_rgb": True,
}


_CLIP = {
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": 224,
    "do_pad": False,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}


_VIT = {
    "size": {"height": 224, "width": 224},
    "resample": 2,
    "do_center_crop": False,
    "crop_size": 224,
    "do_pad": False,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}


_IDEFICS3 = {
    "size": {"longest_edge": 4 * 364},
    "resample": 1,
    "do_image_splitting": True,
    "max_image_size": {"longest_edge": 364},
    "do_pad": True,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}


_HUB_DEFAULTS = {
    "BitImageProcessor": _CLIP,
    "CLIPImageProcessor": _CLIP,
    "ViTImageProcessor": _VIT,
    "SiglipImageProcessor": _VIT | {"resample": 3},
    "Idefics3ImageProcessor": _IDEFICS3,
    "SmolVLMImageProcessor": _IDEFICS3,
}


# What changes no pixel of a picture: names, what goes along with the pixels, and how to read a
# video.
_HUB_BOOKKEEPING = (
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "_valid_processor_keys",
    "return_row_col_info",
    "video_sampling",
    "data_format",
    "default_to_square",
    "device",
    "disable_grouping",
    "input_data_format",
    "return_tensors",
)


_HUB_LONGEST = 4096  # pixels; the reference makes no image longer than this


def parse_image_config(config: dict[str, Any]) -> ImageConfig:
    """Read a hub `preprocessor_config.json` of DINOv2's (Bit), CLIP's, ViT's, SigLIP's, Idefics3's
    or SmolVLM's processor.

    Missing settings take that processor's documented defaults. A setting that is not implemented
    and an unknown key are errors.
    """
    where = "preprocessor_config.json"
    check(
        isinstance(config, dict),
        f"expected a table of settings, found {type(config).__name__}",
        where,
    )
    kind = str(
        config.get("image_processor_type") or config.get("feature_extractor_type")
    )  # the older name
    kind = kind.removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
    check(
        kind in _HUB_DEFAULTS,
        f"image_processor_type is {kind}; can read {list(_HUB_DEFAULTS)}",
        where,
    )
    known = _HUB_FIXED | _HUB_DEFAULTS[kind]
    for (
        key,
        value,
    ) in (
        config.items()
    ):  # newer files list what all processors have, null where it is not this one's
        if value is not None and key not in known and key not in _HUB_BOOKKEEPING:
            raise unknown_key(key, (*known, *_HUB_BOOKKEEPING), where)
    settings = known | {key: value for key, value in config.items() if value is not None}

    require(settings, where, **_HUB_FIXED)
    resample = next(
        (name for name, number in FILTERS.items() if number == settings["resample"]), None
    )
    check(
        resample is not None, f"resample = {settings['resample']} is not one of 0, 1, 2, 3", where
    )
    fit = (
        _tiles_from_hf(settings, where)
        if known.get("do_image_splitting")
        else _one_from_hf(settings, kind, where)
    )
    return ImageConfig(
        resample=resample, mean=settings["image_mean"], std=settings["image_std"], **fit
    )


def read_processor(folder: Path) -> dict[str, Any] | None:
    """What a hub folder says of its images, for `from_hf`: in a file of its own, or, in newer
    folders, within that of a processor of text and images; None where neither does."""
    if (folder / "preprocessor_config.json").exists():
        return read_json(folder / "preprocessor_config.json")
    path = folder / "processor_config.json"
    nested = read_json(path).get("image_processor") if path.exists() else None
    return nested if isinstance(nested, dict) else None


def _one_from_hf(settings: dict[str, Any], kind: str, where: str) -> dict[str, Any]:
    """Of a processor that makes one picture of an image: what to give ImageConfig."""
    require(settings, where, do_pad=False)
    size, crop, do_crop = settings["size"], settings["crop_size"], settings["do_center_crop"]
    if isinstance(size, int):  # in older files: one number, whose meaning is the processor's
        size = (
            {"height": size, "width": size}
            if kind == "ViTImageProcessor"
            else {"shortest_edge": size}
        )
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    shape = [sorted(value) if isinstance(value, dict) else None for value in (size, crop)]
    if shape[0] == ["height", "width"] and (not do_crop or crop == size):
        return {"fit": "squash", **size}
    check(
        do_crop and shape == [["shortest_edge"], ["height", "width"]],
        f"size {size} with do_center_crop {do_crop} and crop_size {crop} is not implemented",
        where,
    )
    return {"fit": "crop", **size, **crop}


def _tiles_from_hf(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """Of a processor that cuts tiles: what to give ImageConfig. It pads batches, not images, so
    `do_pad` is no matter."""
    require(settings, where, do_image_splitting=True)
    size, tile = (
        value.get("longest_edge") if isinstance(value, dict) and len(value) == 1 else None
        for value in (settings["size"], settings["max_image_size"])
    )
    check(
        type(size) is type(tile) is int and 0 < tile < size <= _HUB_LONGEST and size % tile == 0,
        f"size {settings['size']} with max_image_size {settings['max_image_size']} is not implemented, only a "
        f"longest_edge that is a multiple of max_image_size's, and at most {_HUB_LONGEST}",
        where,
    )
    return {"fit": "tiles", "height": tile, "width": tile, "max_tiles": size // tile}
