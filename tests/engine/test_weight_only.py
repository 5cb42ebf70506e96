"""Weights in 8 and 4 bits for answers: against loops over their definitions, PyTorch's kernels
against the written-out matrix, and whole language models."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nanovlm.engine.weight_only import (
    GROUP,
    LAYOUTS,
    Int4WeightOnly,
    Int8WeightOnly,
    LinearPart,
    WeightOnlyLinear,
    kernel_layout,
    pack,
    quantize_for_answers,
    unpack,
)
from nanovlm.generate import Prompt, decode
from nanovlm.model.language_model import LanguageModel, LanguageModelConfig

KINDS = {"int8": Int8WeightOnly, "int4": Int4WeightOnly}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(64, 64), (128, 96), (5, 32), (70, 160)]  # whole blocks of rows, and parts of one


def linear(out_features: int, in_features: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias=bias)


def model(**changes) -> LanguageModel:
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    config = LanguageModelConfig(**{"vocab_size": 300, **sizes, **heads, **changes})
    return LanguageModel(config).eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_its_definition(shape):
    layer = linear(*shape)
    matrix = Int8WeightOnly(layer, torch.float32).dequantize().tolist()
    for row, original in zip(matrix, layer.weight.tolist()):
        step = torch.tensor(max(map(abs, original)) / 127).item()
        assert row == pytest.approx([round(value / step) * step for value in original], rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_int4_is_its_definition(shape):
    layer = linear(*shape)
    matrix = Int4WeightOnly(layer, torch.float32).dequantize().tolist()
    for row, original in zip(matrix, layer.weight.tolist()):
        for start in range(0, shape[1], GROUP):
            group, decoded = original[start : start + GROUP], row[start : start + GROUP]
            scale = (max(group) - min(group)) / 15
            offset = min(group) + 8 * scale
            codes = [round((value - offset) / scale) + 8 for value in group]
            assert min(codes) == 0 and max(codes) == 15
            assert decoded == pytest.approx(
                [(code - 8) * scale + offset for code in codes], abs=1e-6
            )


@pytest.mark.parametrize("kind", KINDS)
def test_equal_weights_and_zeros_stay_what_they_are(kind):
    layer = nn.Linear(64, 3, bias=False)
    layer.weight.data = torch.tensor([0.0, 0.5, -0.25])[:, None].expand(3, 64).contiguous()
    assert torch.allclose(KINDS[kind](layer, torch.float32).dequantize(), layer.weight, atol=1e-7)


@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_multiplies_with_the_matrix_that_it_decodes(kind, shape, dtype, rows):
    """Both ways: through the kernel, for few rows, and through the decoded matrix."""
    layer = KINDS[kind](linear(*shape), dtype)
    inputs = torch.randn(2, rows, shape[1]).to(dtype)
    exact = F.linear(inputs.double(), layer.dequantize().double(), layer.bias.double())
    outputs = layer(inputs)
    assert outputs.dtype == dtype and outputs.shape == (2, rows, shape[0])
    assert (outputs - exact).abs().max() < 8 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_is_a_row_of_the_matrix(kind, dtype, layout, monkeypatch):
    monkeypatch.setattr("nanovlm.engine.weight_only.kernel_layout", lambda: layout)
    monkeypatch.setattr("nanovlm.engine.weight_only.AT_ONCE", 128)  # several parts
    table = KINDS[kind](linear(300, 64, bias=False), dtype)
    ids = torch.randint(0, 300, (3, 70))
    assert torch.equal(table.rows(ids), table.dequantize()[ids])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_packing_and_unpacking_are_inverse(layout):
    codes = torch.randint(0, 16, (128, 64), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, *layout), *layout), codes)


def test_the_order_of_this_machine_is_that_of_pytorch():
    layout = kernel_layout()
    if layout is None:
        pytest.skip("PyTorch's kernel for 4 bits reads none of our orders on this machine")
    codes = torch.randint(0, 16, (192, 32), dtype=torch.uint8)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    assert torch.equal(pack(codes, *layout).flatten(), packed.flatten())


def test_without_a_kernel_the_decoded_matrix_serves(monkeypatch):
    inputs, source = torch.randn(1, 64), linear(64, 64)
    with_kernel = Int4WeightOnly(source, torch.float32)(inputs)
    monkeypatch.setattr("nanovlm.engine.weight_only.kernel_layout", lambda: None)
    layer = Int4WeightOnly(source, torch.float32)
    assert layer.kernel_rows == 0
    torch.testing.assert_close(layer(inputs), with_kernel, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_computes_with_what_its_layers_decode(kind, tied):
    original = model(tie_word_embeddings=tied)
    quantized = copy.deepcopy(original)
    quantize_for_answers(quantized, kind, torch.float32)
    decoded = copy.deepcopy(original)
    for name, linear in decoded.blocks.named_modules():
        if isinstance(linear, nn.Linear):
            linear.weight.data = quantized.blocks.get_submodule(name).dequantize()
    decoded.embed_tokens.weight.data = quantized.embed_tokens.table.dequantize()
    if not tied:
        decoded.lm_head.weight.data = quantized.quantized_head.dequantize()
    ids = torch.randint(0, 300, (2, 40))
    torch.testing.assert_close(quantized(ids), decoded(ids), rtol=1e-4, atol=1e-4)
    prompt = Prompt(quantized.embed_tokens(ids), ids)
    tokens = list(decode(quantized, prompt, 8, []))
    assert tokens == list(decode(decoded, Prompt(decoded.embed_tokens(ids), ids), 8, []))


def test_layers_of_one_input_are_one_product_and_keep_nothing():
    quantized = model()
    quantize_for_answers(quantized, "int8", torch.float32)
    parts = [layer for layer in quantized.modules() if isinstance(layer, LinearPart)]
    assert len(parts) == 2 * (3 + 2) and len({id(part.joined) for part in parts}) == 2 * 2
    quantized(torch.randint(0, 300, (1, 7)))
    assert not any(part.joined.outputs or part.joined.inputs is not None for part in parts)
    first, second = parts[:2]
    first(torch.randn(1, 64))
    with pytest.raises(AssertionError, match="have one input"):
        second(torch.randn(1, 64))


@pytest.mark.parametrize("kind", KINDS)
def test_no_matrix_stays_in_many_bits(kind):
    changes = dict(num_experts=2, intermediate_size=100, tie_word_embeddings=False)
    quantized = model(**changes)
    before = sum(parameter.nbytes for parameter in quantized.parameters())
    quantize_for_answers(quantized, kind, torch.float32)
    left = {name for name, value in quantized.named_parameters() if value.dim() > 1}
    assert all("router" in name or "gate" in name for name in left), left
    layers = [layer for layer in quantized.blocks.modules() if isinstance(layer, WeightOnlyLinear)]
    kinds = set(map(type, layers))
    # 100 inputs are no whole groups of 32: those matrices take 8 bits.
    assert kinds == ({Int4WeightOnly, Int8WeightOnly} if kind == "int4" else {Int8WeightOnly})
    tensors = (*quantized.parameters(), *quantized.buffers())
    assert sum(tensor.nbytes for tensor in tensors) < 0.4 * before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 15, 24, 33])
def test_rows_in_8_bits_that_no_vector_of_a_cpu_fits(width, dtype):
    """In bfloat16 the kernel crashed the process."""
    layer = Int8WeightOnly(nn.Linear(width, 5, bias=False), dtype)
    inputs = torch.randn(3, width).to(dtype)
    expected = inputs.float() @ layer.dequantize().float().T
    torch.testing.assert_close(layer(inputs).float(), expected, rtol=0.05, atol=0.05)
