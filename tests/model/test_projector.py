"""The projectors against plain formulas, and the number of tokens that each gives for a grid."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Idefics3Config, LlamaConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

from nanovlm.errors import NanoVLMError
from nanovlm.model.projector import PROJECTORS, ProjectorConfig, build_projector, pixel_shuffle
from tests.reference.models import randomise


def patches(side: int, width: int = 5) -> Tensor:
    return torch.randn(2, side * side, width, generator=torch.Generator().manual_seed(side))


def build(kind: str, **settings: int | bool | str) -> nn.Module:
    torch.manual_seed(0)
    return build_projector(ProjectorConfig(kind, **settings), vision_width=5, text_width=7)


def downsample(grid: int, side: int) -> Tensor:
    """The (grid, side) matrix of the antialiased bilinear filter, as the projector applies it along
    one axis."""
    projector = build("bilinear", grid=grid)
    projector.up = projector.down = nn.Identity()
    # An image with constant columns: column n is one in channel n and zero in the others.
    image = torch.eye(side).expand(side, side, side).reshape(1, side * side, side)
    return projector(image + 10)[0].view(grid, grid, side)[0] - 10  # from 9 on, GELU(x) = x in fp32


def test_linear_and_mlp_equal_their_formulas():
    x = patches(4)
    linear, mlp = build("linear"), build("mlp")
    torch.testing.assert_close(linear(x), x @ linear.linear.weight.T + linear.linear.bias)
    hidden = x @ mlp.up.weight.T + mlp.up.bias
    gelu = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    torch.testing.assert_close(mlp(x), gelu @ mlp.down.weight.T + mlp.down.bias)


@pytest.mark.parametrize("side, scale", [(4, 2), (6, 3), (6, 2), (3, 1), (4, 4)])
def test_pixel_shuffle_equals_a_loop(side, scale):
    x = patches(side)
    squares = []
    for top in range(0, side, scale):
        for left in range(0, side, scale):
            square = [
                x[:, (top + row) * side + left + column]
                for row in range(scale)
                for column in range(scale)
            ]
            squares.append(torch.cat(square, dim=-1))
    expected = torch.stack(squares, dim=1)
    assert torch.equal(pixel_shuffle(x, scale), expected)
    projector = build("pixel_shuffle", scale=scale)
    torch.testing.assert_close(
        projector(x), F.linear(expected, projector.linear.weight, projector.linear.bias)
    )


def test_bilinear_from_16_to_8_weighs_each_four_patches_1_3_3_1():
    weights = downsample(8, 16)
    expected = torch.zeros(8, 16)
    for cell in range(8):
        for patch, weight in zip(range(2 * cell - 1, 2 * cell + 3), (1, 3, 3, 1)):
            if 0 <= patch < 16:
                expected[cell, patch] = weight
    expected /= expected.sum(dim=1, keepdim=True)  # at the edge, fewer patches share the weight
    torch.testing.assert_close(weights, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("grid, side", [(3, 5), (4, 14), (8, 37), (5, 5), (1, 3)])
def test_bilinear_is_a_weighted_average_of_all_patches(grid, side):
    weights = downsample(grid, side)
    assert (weights >= -1e-5).all() and (weights.sum(dim=0) > 1e-2).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(grid), atol=1e-3, rtol=0)
    assert (weights.argmax(dim=1).diff() > 0).all()  # the cells keep the order of the patches
    projector = build("bilinear", grid=grid)
    constant = torch.randn(1, 1, 5).expand(1, side * side, 5)
    tokens = projector(constant)
    torch.testing.assert_close(tokens, tokens[:, :1].expand_as(tokens), atol=1e-5, rtol=0)
    expected = projector.down(F.gelu(projector.up(constant[:, 0])))
    torch.testing.assert_close(tokens[:, 0], expected, atol=1e-5, rtol=0)


def test_bilinear_does_not_mix_up_rows_and_columns():
    column_wise = torch.arange(16.0).repeat(16, 1).reshape(1, 256, 1) + 20
    projector = build("bilinear")
    projector.up = projector.down = nn.Identity()
    tokens = projector(column_wise).view(8, 8)
    assert torch.allclose(tokens, tokens[:1], atol=1e-4) and (tokens[0].diff() > 1).all()


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("linear", {}),
        ("mlp", {}),
        ("pixel_shuffle", {"scale": 2}),
        ("pixel_shuffle", {"scale": 3}),
        ("bilinear", {"grid": 5}),
        ("resampler", {"num_queries": 3, "num_heads": 5}),
    ],
)
def test_num_tokens_equals_the_length_of_the_output(kind, settings):
    projector = build(kind, **settings)
    tokens = projector(patches(6))
    assert tokens.shape == (2, projector.num_tokens(36), 7)


@pytest.mark.parametrize("kind", PROJECTORS)
def test_bfloat16_in_bfloat16_out(kind):
    projector, x = build(kind, grid=3, num_heads=1), patches(6)
    half = build(kind, grid=3, num_heads=1).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), projector(x), atol=0.03, rtol=0.03)


@pytest.mark.parametrize(
    "kind, settings, num_patches, message",
    [
        ("pixel_shuffle", {"scale": 3}, 16, "a grid of 4×4 patches is not made of 3×3 squares"),
        ("pixel_shuffle", {"scale": 2}, 12, "12 patches are not a square grid"),
        ("bilinear", {"grid": 8}, 49, "49 patches cannot be averaged down to 8×8"),
        ("bilinear", {"grid": 2}, 50, "50 patches are not a square grid"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(kind, settings, num_patches, message):
    with pytest.raises(NanoVLMError, match=message):
        build(kind, **settings).num_tokens(num_patches)


def test_an_unknown_kind_lists_the_known_ones():
    with pytest.raises(
        NanoVLMError,
        match="'mpl' is not known; take one of linear, mlp, pixel_shuffle, bilinear, resampler",
    ):
        build("mpl")


@pytest.mark.parametrize("kind", ["mlp", "bilinear", "resampler"])
@pytest.mark.parametrize(
    "activation, module",
    [("silu", nn.SiLU()), ("gelu", nn.GELU()), ("gelu_pytorch_tanh", nn.GELU("tanh"))],
)
def test_the_activation_is_the_configured_one(kind, activation, module):
    projector, x = build(kind, activation=activation, grid=4, num_heads=1), patches(4) * 4
    plain = build(kind, grid=4, num_heads=1)
    plain.activation = module
    assert torch.equal(projector(x), plain(x))
    assert torch.equal(projector(x), build(kind, grid=4, num_heads=1)(x)) == (activation == "gelu")


@pytest.mark.parametrize("kind", ["linear", "pixel_shuffle"])
def test_without_a_bias_zeros_map_to_zeros(kind):
    projector = build(kind, bias=False)
    assert [name for name, _ in projector.named_parameters()] == ["linear.weight"]
    assert not projector(torch.zeros(1, 16, 5)).any() and build(kind)(torch.zeros(1, 16, 5)).any()


@pytest.mark.parametrize("scale", [2, 4])
@torch.inference_mode()
def test_pixel_shuffle_without_bias_is_the_connector_of_idefics3_and_smolvlm(scale):
    language = LlamaConfig(hidden_size=7, num_attention_heads=1, num_key_value_heads=1, head_dim=8)
    vision = dict(hidden_size=5, num_attention_heads=1)
    config = Idefics3Config(text_config=language, vision_config=vision, scale_factor=scale)
    reference = Idefics3Connector(config)
    projector, x = build("pixel_shuffle", scale=scale, bias=False), patches(8)
    projector.linear.weight.copy_(reference.modality_projection.proj.weight)
    torch.testing.assert_close(projector(x), reference(x), atol=1e-6, rtol=0)


def plain_resampler(ours: nn.Module, heads: int) -> Callable[[Tensor], Tensor]:
    """The resampler from PyTorch's own modules, with the same weights."""
    attention = nn.MultiheadAttention(ours.queries.shape[1], heads, batch_first=True)
    with torch.no_grad():
        layers = ours.attention.q_proj, ours.attention.k_proj, ours.attention.v_proj
        attention.in_proj_weight.copy_(torch.cat([layer.weight for layer in layers]))
        attention.in_proj_bias.copy_(torch.cat([layer.bias for layer in layers]))
    attention.out_proj = ours.attention.out_proj
    mlp = nn.Sequential(ours.mlp_norm, ours.mlp_up, nn.GELU(), ours.mlp_down)
    head = nn.Sequential(ours.head_norm, ours.head_up, nn.GELU(), ours.head_down)

    def forward(x: Tensor) -> Tensor:
        tokens = torch.stack(
            [attention(ours.queries[None], one[None], one[None])[0][0] for one in x]
        )
        return head(tokens + mlp(tokens))

    return forward


def test_the_resampler_is_attention_a_residual_mlp_and_a_head():
    torch.manual_seed(0)
    projector = build_projector(
        ProjectorConfig("resampler", num_queries=6, num_heads=4), vision_width=24, text_width=10
    )
    queries = projector.queries.data.clone()
    randomise(projector, seed=1)  # as initialised, the norms' scales of 1 would not be tested
    projector.queries.data = queries
    reference, x = plain_resampler(projector, heads=4), patches(5, width=24)
    tokens = projector(x)
    torch.testing.assert_close(tokens, reference(x), atol=1e-5, rtol=1e-5)
    assert tokens.shape == (2, 6, 10) and tokens.std(dim=1).mean() > 0.05  # the queries differ
    assert projector.mlp_up.weight.shape == (96, 24) and projector.head_up.weight.shape == (10, 24)
    shuffled = x[:, torch.randperm(25)]
    # The order of the patches does not matter: the vision encoder has added their positions.
    torch.testing.assert_close(projector(shuffled), tokens, atol=1e-5, rtol=1e-5)
    assert projector.num_tokens(25) == projector.num_tokens(12) == 6


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"activation": "relu"},
            "activation is 'relu'; take one of gelu, gelu_pytorch_tanh, quick_gelu, silu",
        ),
        (
            {"num_heads": 2},
            "patch vectors of 5 numbers cannot be split into the resampler.s 2 heads",
        ),
        ({"num_queries": 0}, "num_queries is 0; it has to be above 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(NanoVLMError, match=message):
        build("resampler", **settings)
