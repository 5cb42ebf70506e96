"""The `preprocessor_config.json` of each processor: published ones are read, others refused."""

import json
import math
from dataclasses import replace

import pytest

from nanovlm.errors import NanoVLMError
from nanovlm.hub.image_configs import parse_image_config, read_image_config
from nanovlm.inputs.image_config import ImageConfig

DINOV2 = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,
    "size": {"shortest_edge": 256},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 0.00392156862745098,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
SMOLVLM2 = {  # as published
    "do_convert_rgb": True,
    "do_image_splitting": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SmolVLMImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "max_image_size": {"longest_edge": 512},
    "processor_class": "SmolVLMProcessor",
    "resample": 1,
    "rescale_factor": 0.00392156862745098,
    "size": {"longest_edge": 2048},
    "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 512}},
}


def test_dinov2s_published_file() -> None:
    expected = ImageConfig(height=224, width=224, fit="crop", shortest_edge=256, resample="bicubic")
    assert parse_image_config(DINOV2) == expected
    older = {"feature_extractor_type": "ViTFeatureExtractor", "size": 384, "image_mean": [0.5] * 3}
    assert parse_image_config(older) == ImageConfig(
        384, 384, resample="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3
    )


def test_other_published_files() -> None:
    half = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    tiles = ImageConfig(512, 512, fit="tiles", max_tiles=4, resample="lanczos", **half)
    assert parse_image_config(SMOLVLM2) == tiles
    assert (
        parse_image_config(SMOLVLM2 | {"image_processor_type": "Idefics3ImageProcessorFast"})
        == tiles
    )
    assert parse_image_config({"image_processor_type": "Idefics3ImageProcessor"}) == replace(
        tiles, height=364, width=364
    )
    siglip = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "SiglipProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": 384, "width": 384},
    }
    assert parse_image_config(siglip) == ImageConfig(384, 384, resample="bicubic", **half)
    fast = {
        "crop_size": None,
        "data_format": "channels_first",
        "default_to_square": True,
        "device": None,
        "disable_grouping": None,
        "do_center_crop": None,
        "do_convert_rgb": None,
        "do_pad": None,
        "input_data_format": None,
        "pad_size": None,
        "return_tensors": None,
    }  # what is added where the processor on tensors wrote the file
    assert parse_image_config(siglip | fast) == parse_image_config(siglip)
    assert (
        parse_image_config(SMOLVLM2 | fast | {"image_processor_type": "SmolVLMImageProcessorFast"})
        == tiles
    )
    clip = {
        "crop_size": 336,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "resample": 3,
        "size": 336,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    assert parse_image_config(clip) == ImageConfig(
        336,
        336,
        fit="crop",
        shortest_edge=336,
        mean=tuple(clip["image_mean"]),
        std=tuple(clip["image_std"]),
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"do_center_corp": True}, ("do_center_corp", "do_center_crop")),
        (
            {"image_processor_type": "LlavaNextImageProcessor"},
            ("LlavaNextImageProcessor", "BitImageProcessor"),
        ),
        (
            {"image_processor_type": "SiglipImageProcessor", "size": 384, "do_center_crop": False},
            ("size",),
        ),
        ({"do_image_splitting": True}, ("do_image_splitting",)),
        ({"image_processor_type": None}, ("image_processor_type",)),
        ({"do_resize": False}, ("do_resize",)),
        ({"do_rescale": False}, ("do_rescale",)),
        ({"do_normalize": False}, ("do_normalize",)),
        ({"do_pad": True}, ("do_pad",)),
        ({"rescale_factor": 1.0}, ("rescale_factor",)),
        ({"resample": 5}, ("resample",)),
        ({"resample": [3]}, ("resample",)),
        ({"do_center_crop": False}, ("do_center_crop",)),
        ({"size": {"shortest_edge": 256, "longest_edge": 512}}, ("longest_edge",)),
        ({"size": {"height": 256, "width": 256}}, ("crop_size",)),
        ({"size": 3.5}, ("size",)),
        ({"crop_size": "224"}, ("crop_size",)),
        ({"size": {"shortest_edge": 100}}, ("shortest_edge",)),
        ({"image_std": [0.2, 0.0, 0.2]}, ("std",)),
        ({"image_mean": [0.2, 0.1]}, ("mean",)),
    ],
)
def test_what_is_not_implemented_is_refused(change: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(NanoVLMError) as caught:
        parse_image_config(DINOV2 | change)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"do_image_splitting": False}, ("do_image_splitting",)),
        ({"size": {"longest_edge": 512}}, ("longest_edge", "max_image_size")),
        ({"size": {"longest_edge": 1000}}, ("longest_edge",)),
        ({"size": {"longest_edge": 8192}}, ("4096",)),
        ({"size": {"height": 512, "width": 512}}, ("height",)),
        ({"max_image_size": 512}, ("max_image_size",)),
        ({"max_image_size": {"longest_edge": 0}}, ("max_image_size",)),
        ({"do_center_crop": True}, ("do_center_crop",)),
        ({"do_resize": False}, ("do_resize",)),
    ],
)
def test_what_is_not_implemented_of_tiles_is_refused(change: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(NanoVLMError) as caught:
        parse_image_config(SMOLVLM2 | change)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_file_that_is_no_table_is_refused() -> None:
    with pytest.raises(NanoVLMError, match="expected a table of settings, found list"):
        parse_image_config([])


@pytest.mark.parametrize(
    ("encoder", "mean", "size"),
    [
        ({"model_type": "dinov2"}, (0.485, 0.456, 0.406), 224),
        ({"model_type": "siglip_vision_model", "image_size": 384}, (0.5, 0.5, 0.5), 384),
        ({"model_type": "siglip", "vision_config": {"image_size": 256}}, (0.5, 0.5, 0.5), 256),
        ({"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14},
         (0.48145466, 0.4578275, 0.40821073), 336),
        ({"model_type": "smolvlm_vision", "image_size": 512, "patch_size": 16}, (0.5,) * 3, 512),
        ({"model_type": "qwen_vl_vision"}, (0.48145466, 0.4578275, 0.40821073), 448),
    ],
)  # fmt: skip
def test_without_a_processor_the_familys_values_are_taken(tmp_path, encoder, mean, size) -> None:
    (tmp_path / "config.json").write_text(json.dumps(encoder))
    image = read_image_config(tmp_path)
    assert image.mean == mean and image.height == size
    assert (image.fit == "tiles") == (encoder["model_type"] == "smolvlm_vision")


@pytest.mark.parametrize(
    "change",
    [
        {"image_mean": [0.5]},
        {"image_std": [0, 0.5, 0.5]},
        {"image_std": [1e-320] * 3},
        {"image_mean": [math.nan] * 3},
        {"image_mean": [127.5] * 3},
        {"image_mean": "0.5"},
        {"size": {"height": 2**62, "width": 2**62}},
        {"size": {"height": math.nan, "width": 224}},
        {"size": {"height": True, "width": True}},
        {"size": {"height": -1, "width": 224}},
        {"size": {"height": 224.0, "width": 224.0}},
        {"size": math.inf},
        {"resample": True},
        {"resample": math.nan},
        {"rescale_factor": math.nan},
        {"crop_size": [1]},
    ],
)
def test_numbers_of_a_processor_are_checked(tmp_path, change: dict) -> None:
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "do_center_crop": "crop_size" in change,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor | change))
    with pytest.raises(NanoVLMError) as caught:
        read_image_config(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: ")


def test_keys_that_only_sign_a_processor_are_passed_over() -> None:
    signed = DINOV2 | {"_processor_class": "a", "unsloth_version": "1", "transformers_version": "5"}
    assert parse_image_config(signed) == parse_image_config(DINOV2)
