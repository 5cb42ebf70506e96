"""The vision encoder against `transformers`' DINOv2, SigLIP, CLIP, SmolVLM and Idefics3, at several
image sizes. Qwen-VL's is compared in test_resampler.py."""

import json
import os
from inspect import signature
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Dinov2Model, PreTrainedModel

from nanovlm.errors import NanoVLMError
from nanovlm.hub.models import load_vision_encoder
from nanovlm.hub.safetensors import SafetensorsFile, save_file
from nanovlm.hub.vision_configs import parse_vision_encoder_config
from nanovlm.model.vision_encoder import VisionEncoder
from nanovlm.utils.files import read_json
from tests.reference.models import VISION_CLASSES, dinov2, vision_model, whole_model

VARIANTS = {
    "plain": {},
    "swiglu": {"swiglu": True},
    "registers": {"registers": 4},
    "swiglu and registers": {"swiglu": True, "registers": 3},
}
# The size of the position table, a larger one, and two that are not square.
SIZES = [(28, 28), (42, 42), (49, 21), (14, 70)]


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def pair(request: pytest.FixtureRequest, tmp_path_factory) -> tuple[VisionEncoder, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("dinov2")
    reference = dinov2(folder, **request.param)
    return load_vision_encoder(folder), reference


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> VisionEncoder:
    folder = tmp_path_factory.mktemp("dinov2")
    dinov2(folder)
    return load_vision_encoder(folder)


def images(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.inference_mode()
def test_equals_the_reference(pair, size):
    ours, reference = pair
    pixels = images(*size)
    expected = reference(pixels, output_hidden_states=True)
    first_patch = 1 + ours.config.num_register_tokens
    torch.testing.assert_close(ours(pixels), expected.last_hidden_state, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        ours.patches(pixels), expected.last_hidden_state[:, first_patch:], atol=1e-5, rtol=0
    )
    for layer in range(-4, 4):  # before the norm; after it is compared above
        patches = ours.patches(pixels, layer, norm=False)
        expected_patches = expected.hidden_states[layer][:, first_patch:]
        torch.testing.assert_close(patches, expected_patches, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_bfloat16_is_as_close_to_fp32_as_the_reference_is(pair, tmp_path):
    _ours, reference = pair
    pixels = images(49, 21)
    exact = reference(pixels).last_hidden_state
    reference.save_pretrained(tmp_path)
    half = load_vision_encoder(tmp_path, dtype=torch.bfloat16)
    features = half(pixels.bfloat16())
    assert features.dtype == torch.bfloat16
    reference_half = type(reference).from_pretrained(tmp_path, dtype=torch.bfloat16)
    error = (features - exact).abs()
    reference_error = (reference_half(pixels.bfloat16()).last_hidden_state - exact).abs()
    # The standard deviation of the features is 1.2 to 1.4.
    assert error.mean() < 0.01 and error.max() < 0.1
    assert error.mean() < 1.2 * reference_error.mean()


@torch.inference_mode()
def test_a_patch_embedding_depends_on_the_pixels_of_its_patch_alone(plain):
    pixels = images(35, 49)
    changed = pixels.clone()
    changed[:, :, 7:14, 21:28] += 1  # row 1, column 3 of 5 × 7
    differs = (plain.patches(changed, 0, norm=False) != plain.patches(pixels, 0, norm=False)).any(
        -1
    )
    assert differs.nonzero()[:, 1].tolist() == [1 * 7 + 3] * 2


def test_size_and_layer_are_checked(plain):
    with pytest.raises(NanoVLMError, match="30×28 pixels is not made of 7-pixel patches"):
        plain(images(30, 28))
    for layer in (4, -5):
        message = f"layer {layer} of .* with 3 blocks; take one from -4 to 3"
        with pytest.raises(NanoVLMError, match=message):
            plain.patches(images(28, 28), layer, norm=False)
    for layer in (-2, 0):
        message = f"the final norm follows layer -1, not layer {layer}; set vision_norm = false"
        with pytest.raises(NanoVLMError, match=message):
            plain.patches(images(28, 28), layer)


def reference_states(
    reference: PreTrainedModel, pixels: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The reference's last hidden state and those before each block.

    Some models of `transformers` resize their position table only on request.
    """
    options = {}
    if "interpolate_pos_encoding" in signature(reference.forward).parameters:
        options["interpolate_pos_encoding"] = True
    output = reference(pixels, output_hidden_states=True, **options)
    return output.last_hidden_state, output.hidden_states


@pytest.fixture(scope="module", params=[*VISION_CLASSES, "siglip", "clip", "smolvlm", "idefics3"])
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory
) -> tuple[VisionEncoder, PreTrainedModel, Path]:
    """Our encoder, the reference's, and their folder, which holds the encoder alone or a whole
    model."""
    folder = tmp_path_factory.mktemp(request.param)
    make = vision_model if request.param in VISION_CLASSES else whole_model
    reference = make(folder, request.param)
    return load_vision_encoder(folder), reference, folder


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.inference_mode()
def test_every_family_equals_its_reference(loaded, size):
    ours, reference, _ = loaded
    pixels = images(*size)
    last, states = reference_states(reference, pixels)
    first_patch = ours.config.num_prefix_tokens
    torch.testing.assert_close(ours(pixels), last, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.patches(pixels), last[:, first_patch:], atol=1e-5, rtol=0)
    for layer in range(-4, 4):
        patches = ours.patches(pixels, layer, norm=False)
        torch.testing.assert_close(patches, states[layer][:, first_patch:], atol=1e-5, rtol=0)
        assert patches.shape[1:] == ours.config.feature_shape(*size, layer, norm=False)
    assert ours(pixels).shape[1] == ours.config.num_tokens(*size)


@torch.inference_mode()
def test_every_family_in_bfloat16_is_as_close_to_fp32_as_its_reference_is(loaded):
    _ours, reference, folder = loaded
    pixels = images(42, 42)
    exact = reference_states(reference, pixels)[0]
    features = load_vision_encoder(folder, dtype=torch.bfloat16)(pixels.bfloat16())
    half = type(reference)(reference.config)
    half.load_state_dict(reference.state_dict())
    reference_features = reference_states(half.bfloat16().eval(), pixels.bfloat16())[0]
    error, reference_error = (features - exact).abs(), (reference_features - exact).abs()
    assert features.dtype == torch.bfloat16
    # The standard deviation of the features is 1 to 2.
    assert error.mean() < 0.02 and error.max() < 0.15
    assert error.mean() < 1.2 * reference_error.mean()


@torch.inference_mode()
def test_pixels_beyond_the_last_whole_patch_are_cut_off_as_in_the_reference(tmp_path):
    """SigLIP so400m/14 at 384 pixels has 27 patches a side, and 6 pixels are left over."""
    reference = vision_model(tmp_path, "siglip_vision_model", image_size=30)
    ours, pixels = load_vision_encoder(tmp_path), images(30, 30)
    torch.testing.assert_close(ours(pixels), reference(pixels).last_hidden_state, atol=1e-5, rtol=0)
    assert ours.config.num_patches(30, 30) == 16


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "quick_gelu"])
@torch.inference_mode()
def test_every_activation(activation, tmp_path):
    reference = vision_model(tmp_path, "clip_vision_model", hidden_act=activation)
    ours, pixels = load_vision_encoder(tmp_path), images(28, 28)
    assert ours.config.hidden_act == activation
    torch.testing.assert_close(ours(pixels), reference(pixels).last_hidden_state, atol=1e-5, rtol=0)


def change_file(folder: Path, change: dict[str, Tensor], drop: tuple[str, ...] = ()) -> None:
    file = SafetensorsFile(folder / "model.safetensors")
    tensors = {name: file.tensor(name) for name in file.keys() if name not in drop}
    save_file(tensors | change, folder / "model.safetensors")


def test_older_files_have_a_prefix_and_a_tensor_of_position_ids(tmp_path):
    reference = vision_model(tmp_path, "clip_vision_model")
    file = SafetensorsFile(tmp_path / "model.safetensors")
    older = {f"vision_model.{name}": file.tensor(name) for name in file.keys()}
    older["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(older, tmp_path / "model.safetensors")
    ours, pixels = load_vision_encoder(tmp_path), images(28, 28)
    with torch.inference_mode():
        expected = reference(pixels).last_hidden_state
        torch.testing.assert_close(ours(pixels), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", ["siglip", "clip", "smolvlm"])
def test_an_unexpected_or_missing_tensor_is_refused(model_type, tmp_path):
    whole_model(tmp_path, model_type)
    change_file(tmp_path, {"mystery.weight": torch.zeros(1)})
    with pytest.raises(NanoVLMError, match="1 unexpected.*(?s:.)*mystery.weight"):
        load_vision_encoder(tmp_path)
    prefix = "model.vision_model." if model_type == "smolvlm" else "vision_model."
    change_file(tmp_path, {}, drop=("mystery.weight", f"{prefix}encoder.layers.1.mlp.fc1.bias"))
    with pytest.raises(NanoVLMError, match="1 missing.*(?s:.)*blocks.1.mlp.up_proj.bias"):
        load_vision_encoder(tmp_path)


def test_a_key_left_out_of_a_config_has_the_default_of_the_reference():
    for config_class, _ in VISION_CLASSES.values():
        defaults = config_class()
        config = parse_vision_encoder_config({"model_type": defaults.model_type})
        assert config == parse_vision_encoder_config(defaults.to_dict())
    whole = parse_vision_encoder_config(
        {"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}}
    )
    assert whole == parse_vision_encoder_config({"model_type": "siglip_vision_model"})
    older = {
        "model_type": "clip",
        "vision_config": {"patch_size": 14, "top_k": 50},
        "vision_config_dict": {"hidden_size": 960},
    }
    config = parse_vision_encoder_config(older | {"vision_config": {"patch_size": 14}})
    assert (config.patch_size, config.hidden_size) == (14, 960)
    # The oldest files have settings of text generation, such as top_k, among the vision encoder's.
    assert parse_vision_encoder_config(older) == config


def test_smolvlm2_256m():
    config = parse_vision_encoder_config(
        {
            "model_type": "smolvlm",
            "vision_config": {
                "hidden_size": 768,
                "image_size": 512,
                "max_image_size": {"longest_edge": 512},
                "model_type": "smolvlm_vision",
                "num_attention_heads": 12,
                "patch_size": 16,
                "size": {"longest_edge": 2048},
                "tie_word_embeddings": False,
                "use_base_siglip": False,
            },
        }
    )
    shape = (config.num_hidden_layers, config.intermediate_size, config.num_patches(512, 512))
    assert shape == (12, 3072, 1024)
    details = (config.hidden_act, config.layer_norm_eps, config.class_token)
    assert details == ("gelu_pytorch_tanh", 1e-6, False)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "siglip2"}, "NaFlex.* not implemented; take a SigLIP 2 of a fixed size"),
        (
            {"model_type": "siglip_vision_model", "hidden_act": "relu"},
            "hidden_act is 'relu'; take one of gelu, gelu_py",
        ),
        ({"model_type": ["clip"]}, "model_type is .'clip'.; implemented are"),
        (
            {"model_type": "clip_vision_model", "num_channels": 1},
            "num_channels = 1 is not implemented",
        ),
        (
            {"model_type": "clip_vision_model", "patch_sise": 14},
            "unknown key 'patch_sise'; did you mean 'patch_size'?",
        ),
        (
            {"model_type": "clip", "vision_config": {"hidden_sise": 8}},
            "unknown key 'hidden_sise'; did you mean 'hidden_size'?",
        ),
        ({"model_type": "siglip", "vision_confg": {}}, "key 'vision_config' is missing"),
        (
            {"model_type": "smolvlm", "vision_config": {"image_size": [512, 512]}},
            "image_size is .512, 512., expected a value",
        ),
    ],
)
def test_an_unsupported_config_is_refused_in_one_line(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(NanoVLMError, match=message) as raised:
        load_vision_encoder(tmp_path)
    assert "\n" not in str(raised.value) and read_json(tmp_path / "config.json") == config


@pytest.mark.slow
@torch.inference_mode()
def test_equals_the_reference_on_real_weights():
    if "NANOVLM_REAL" not in os.environ:
        pytest.skip("NANOVLM_REAL does not name a folder with dinov2-small")
    folder = Path(os.environ["NANOVLM_REAL"]) / "dinov2-small"
    ours, reference = load_vision_encoder(folder), Dinov2Model.from_pretrained(folder)
    for size in ((224, 224), (518, 518), (140, 322)):
        pixels = images(*size)[:1]
        expected = reference(pixels, output_hidden_states=True)
        torch.testing.assert_close(ours(pixels), expected.last_hidden_state, atol=1e-4, rtol=0)
        for layer in (-1, -2):
            patches = ours.patches(pixels, layer, norm=False)
            states = expected.hidden_states[layer][:, 1:]
            torch.testing.assert_close(patches, states, atol=1e-4, rtol=0)
