"""The vision transformer against `transformers`' DINOv2, every variant, at several image sizes."""

import os
from pathlib import Path

import pytest
import torch
from transformers import Dinov2Model, PreTrainedModel

from nanovlm.errors import NanoVLMError
from nanovlm.vit import VisionTransformer
from tests.reference.models import dinov2

VARIANTS = {
    "plain": {},
    "swiglu": {"swiglu": True},
    "registers": {"registers": 4},
    "swiglu and registers": {"swiglu": True, "registers": 3},
}
SIZES = [(28, 28), (42, 42), (49, 21), (14, 70)]  # the table's own, larger, and two that are not square


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def pair(request: pytest.FixtureRequest, tmp_path_factory) -> tuple[VisionTransformer, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("dinov2")
    reference = dinov2(folder, **request.param)
    return VisionTransformer.from_pretrained(folder), reference


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> VisionTransformer:
    folder = tmp_path_factory.mktemp("dinov2")
    dinov2(folder)
    return VisionTransformer.from_pretrained(folder)


def picture(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.inference_mode()
def test_equals_the_reference(pair, size):
    ours, reference = pair
    pixels = picture(*size)
    expected = reference(pixels, output_hidden_states=True)
    first_patch = 1 + ours.config.num_register_tokens
    torch.testing.assert_close(ours(pixels), expected.last_hidden_state, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.patches(pixels), expected.last_hidden_state[:, first_patch:], atol=1e-5, rtol=0)
    for layer in (-4, -3, -2, 0, 1, 2, 3):  # -1 is after the norm, as tested above
        expected_patches = expected.hidden_states[layer][:, first_patch:]
        torch.testing.assert_close(ours.patches(pixels, layer), expected_patches, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_bfloat16_is_as_close_to_fp32_as_the_reference_is(pair, tmp_path):
    ours, reference = pair
    pixels = picture(49, 21)
    exact = reference(pixels).last_hidden_state
    reference.save_pretrained(tmp_path)
    half = VisionTransformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    features = half(pixels.bfloat16())
    assert features.dtype == torch.bfloat16
    theirs = type(reference).from_pretrained(tmp_path, dtype=torch.bfloat16)(pixels.bfloat16()).last_hidden_state
    error, their_error = (features - exact).abs(), (theirs - exact).abs()
    assert error.mean() < 0.01 and error.max() < 0.1  # on features of standard deviation 1.2 to 1.4
    assert error.mean() < 1.2 * their_error.mean()


@torch.inference_mode()
def test_a_patch_comes_from_its_own_place(plain):
    pixels = picture(35, 49)
    changed = pixels.clone()
    changed[:, :, 7:14, 21:28] += 1  # row 1, column 3 of 5 × 7
    moved = (plain.patches(changed, layer=0) != plain.patches(pixels, layer=0)).any(dim=-1)
    assert moved.nonzero()[:, 1].tolist() == [1 * 7 + 3] * 2


def test_size_and_layer_are_checked(plain):
    with pytest.raises(NanoVLMError, match="30×28 pixels is not made of 7-pixel patches"):
        plain(picture(30, 28))
    for layer in (4, -5):
        with pytest.raises(NanoVLMError, match=f"layer {layer} of .* with 3 blocks; take one from -4 to 3"):
            plain.patches(picture(28, 28), layer)


@pytest.mark.slow
@torch.inference_mode()
def test_equals_the_reference_on_real_weights():
    if "NANOVLM_REAL" not in os.environ:
        pytest.skip("NANOVLM_REAL does not name a folder with dinov2-small")
    folder = Path(os.environ["NANOVLM_REAL"]) / "dinov2-small"
    ours, reference = VisionTransformer.from_pretrained(folder), Dinov2Model.from_pretrained(folder)
    for size in ((224, 224), (518, 518), (140, 322)):
        pixels = picture(*size)[:1]
        expected = reference(pixels, output_hidden_states=True)
        torch.testing.assert_close(ours(pixels), expected.last_hidden_state, atol=1e-4, rtol=0)
        torch.testing.assert_close(ours.patches(pixels, -2), expected.hidden_states[-2][:, 1:], atol=1e-4, rtol=0)
