"""The resampler and Qwen-VL's vision encoder against outputs of the published implementation, kept
in tests/fixtures."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanovlm.errors import NanoVLMError
from nanovlm.hub.loading import load_into, open_checkpoint
from nanovlm.hub.models import load_vision_encoder
from nanovlm.hub.names import VISION_FAMILIES
from nanovlm.hub.safetensors import SafetensorsFile, save_file
from nanovlm.hub.vision_configs import parse_vision_encoder_config
from nanovlm.model.layers import resize_positions, sine_cosine_positions
from nanovlm.model.resampler import Resampler
from nanovlm.model.vision_encoder import VisionEncoder
from tests.reference.models import randomise

FIXTURE = Path(__file__).parents[1] / "fixtures" / "qwen_vl_vision.safetensors"
CONFIG = {
    "model_type": "qwen_vl_vision",
    **json.loads(FIXTURE.with_suffix(".json").read_text())["visual"],
}


@pytest.fixture(scope="module")
def fixture() -> dict[str, Tensor]:
    file = SafetensorsFile(FIXTURE)
    return {name: file.tensor(name) for name in file.keys()}


@pytest.fixture(scope="module")
def folder(fixture, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("qwen_vl")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(
        {name: tensor for name, tensor in fixture.items() if not name.startswith("fixture.")},
        folder / "model.safetensors",
    )
    return folder


@pytest.fixture(scope="module")
def vision_encoder(folder) -> VisionEncoder:
    return load_vision_encoder(folder)


@torch.inference_mode()
def test_qwen_vl_equals_the_published_implementation(vision_encoder, fixture):
    for size, pixels in ((56, fixture["fixture.pixels"]), (112, fixture["fixture.pixels_112"])):
        pooled = fixture["fixture.pooled" if size == 56 else "fixture.pooled_112"]
        for ours in (vision_encoder(pixels), vision_encoder.patches(pixels)):
            # The standard deviation of the outputs is 1.3.
            torch.testing.assert_close(ours, pooled, atol=2e-5, rtol=0)
    patches = vision_encoder.patches(fixture["fixture.pixels"], norm=False)
    torch.testing.assert_close(patches, fixture["fixture.hidden"], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_bfloat16_is_close_to_fp32(folder, fixture):
    half = load_vision_encoder(folder, dtype=torch.bfloat16)
    pooled = half(fixture["fixture.pixels_112"].bfloat16())
    error = (pooled - fixture["fixture.pooled_112"]).abs()
    spread = fixture["fixture.pooled_112"].std()
    assert pooled.dtype == torch.bfloat16
    assert error.mean() < 0.02 * spread and error.max() < 0.15 * spread


@torch.inference_mode()
def test_number_and_width_of_the_feature_vectors_of_an_image(vision_encoder):
    config = vision_encoder.config
    for size in ((56, 56), (112, 112), (28, 84)):
        pixels = torch.randn(1, 3, *size)
        for layer, norm in ((-1, True), (-1, False), (3, True), (-2, False), (0, False)):
            features = vision_encoder.patches(pixels, layer, norm)
            assert features.shape[1:] == config.feature_shape(*size, layer, norm)
    assert config.feature_shape(112, 112) == (16, 256)
    assert config.feature_shape(112, 112, norm=False) == (64, 104)


def test_the_published_config_has_256_positions_and_256_queries():
    config = parse_vision_encoder_config(
        {
            "model_type": "qwen_vl_vision",
            "heads": 16,
            "image_size": 448,
            "image_start_id": 151857,
            "layers": 48,
            "mlp_ratio": 4.9231,
            "output_dim": 4096,
            "patch_size": 14,
            "width": 1664,
        }
    )
    shape = (config.image_size, config.intermediate_size, config.feature_shape(448, 448))
    assert shape == (224, 8192, (256, 4096))
    with torch.device("meta"):
        model = VisionEncoder(config)
    assert model.position_embedding.shape == (1, 256, 1664)
    size = sum(parameter.numel() for parameter in model.parameters())
    assert size == pytest.approx(1.94e9, rel=0.01)


def test_sine_cosine_positions_equal_the_published_ones(fixture):
    published = fixture["transformer.visual.attn_pool.pos_embed"]
    torch.testing.assert_close(sine_cosine_positions(4, 256)[0], published, atol=1e-6, rtol=0)


def test_positions_are_added_to_keys_and_queries_but_not_to_values():
    """Where all patches are equal, the values are too, and the output is the same for every query,
    whatever the positions."""
    resampler = Resampler(hidden_size=16, num_queries=4, output_size=32, eps=1e-6)
    randomise(resampler, seed=0)
    patches = torch.randn(1, 1, 16).expand(1, 9, 16)
    first, *others = resampler(patches, 3, 3)[0]
    for other in others:
        torch.testing.assert_close(other, first, atol=1e-5, rtol=0)


def test_a_resized_position_table_keeps_the_order_of_positions():
    table = torch.arange(16.0).view(1, 16, 1)
    assert resize_positions(table, 4, 4, 4) is table
    assert resize_positions(table, 4, 2, 2, "nearest").flatten().tolist() == [0, 2, 8, 10]
    assert resize_positions(table, 4, 8, 2, "nearest").flatten().tolist()[:4] == [0, 2, 0, 2]
    for mode in ("bicubic", "bicubic_antialias"):
        resized = resize_positions(table, 4, 6, 3, mode)
        assert resized.shape == (1, 18, 1) and resized.diff(dim=1).view(-1)[:2].gt(0).all()


def test_every_tensor_of_the_checkpoint_is_required(fixture, folder, tmp_path):
    tensors = {
        name.removeprefix("transformer.visual."): tensor
        for name, tensor in fixture.items()
        if not name.startswith("fixture.")
    }
    bare = tmp_path / "bare.safetensors"
    save_file(tensors, bare)
    config = parse_vision_encoder_config(CONFIG)
    names = VISION_FAMILIES["qwen_vl_vision"].names(config)
    load_into(VisionEncoder(config), open_checkpoint(bare), names)
    for name in tensors:
        if name == "attn_pool.pos_embed":  # computed, not loaded
            continue
        if "resblocks.1" in name or "resblocks.2" in name:  # the same as in the first block
            continue
        others = {key: tensor for key, tensor in tensors.items() if key != name}
        save_file(others, tmp_path / "incomplete.safetensors")
        with pytest.raises(NanoVLMError, match="missing"):
            incomplete = open_checkpoint(tmp_path / "incomplete.safetensors")
            load_into(VisionEncoder(config), incomplete, names)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_queries": 15}, "num_queries is 15; it has to be a square number"),
        ({"output_dim": 254}, "its width is a multiple of 4"),
        ({"n_querys": 16}, "unknown key 'n_querys'; did you mean 'n_queries'?"),
    ],
)
def test_an_invalid_resampler_config_is_refused(change, message):
    with pytest.raises(NanoVLMError, match=message):
        parse_vision_encoder_config(CONFIG | change)
