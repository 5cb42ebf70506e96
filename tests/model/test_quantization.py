"""NF4 and int8 against plain loops over their definitions, their size and error, and the gradient
of the input."""

import copy
import struct

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from nanovlm.model.language_model import LanguageModel, LanguageModelConfig
from nanovlm.model.quantization import (
    KINDS,
    Int8Linear,
    NF4Linear,
    hide_from_compiler,
    nf4_levels,
    quantize_,
)
from nanovlm.training.precision import Precision
from tests.compiling import count_graphs, everywhere, forget_compiled, needs_cpp, needs_gpu  # noqa: F401

# Appendix E of Dettmers et al. 2023
PUBLISHED = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]
# Less than one block of 64 weights, whole blocks, a part of a block, more than 256 blocks.
SHAPES = [(5, 7), (64, 64), (33, 100), (130, 200)]


def linear(
    out_features: int, in_features: int, bias: bool = False, dtype=torch.float32
) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(in_features, out_features, bias=bias)
    nn.init.normal_(layer.weight, std=0.02)
    return layer.to(dtype)


def single(value: float) -> float:
    """Rounded to fp32."""
    return struct.unpack("f", struct.pack("f", value))[0]


def reference_nf4(weight: torch.Tensor) -> list[float]:
    """NF4 with double quantisation as the paper describes it, block by block and weight by
    weight."""
    flat = weight.flatten().tolist()
    blocks = [flat[start : start + 64] for start in range(0, len(flat), 64)]
    largest = [max(map(abs, block)) for block in blocks]
    mean = sum(largest) / len(largest)
    scales = []
    for start in range(0, len(largest), 256):
        spread = [value - mean for value in largest[start : start + 256]]
        step = max(map(abs, spread)) / 127
        scales += [mean + (round(value / step) * step if step else 0.0) for value in spread]
    return [
        min(PUBLISHED, key=lambda level: abs(level - value / (top or 1.0))) * scale
        for block, top, scale in zip(blocks, largest, scales)
        for value in block
    ]


def reference_int8(weight: torch.Tensor) -> list[float]:
    values = []
    for row in weight.tolist():
        step = single(max(map(abs, row)) / 127) or 1.0
        values += [round(single(value / step)) * step for value in row]
    return values


def relative_error(layer: nn.Module, weight: torch.Tensor) -> float:
    error = layer.dequantize(torch.float32) - weight.float()
    return (error.norm() / weight.float().norm()).item()


def test_the_levels_are_the_published_ones_and_zero_is_exact():
    levels = nf4_levels()
    torch.testing.assert_close(levels, torch.tensor(PUBLISHED), atol=3e-7, rtol=0)
    assert levels[7] == 0 and levels[0] == -1 and levels[15] == 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "reference"), [("nf4", reference_nf4), ("int8", reference_int8)])
def test_a_format_equals_its_definition(kind, reference, shape):
    layer = linear(*shape)
    with torch.no_grad():
        layer.weight[1, :] *= 10  # rows of different scales
        layer.weight[2:] += 0.001
        layer.weight[:, 3] = 0.0
    expected = torch.tensor(reference(layer.weight.detach())).view(shape)
    actual = KINDS[kind](layer).dequantize(torch.float32)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_weights_stay_zero(kind):
    layer = linear(4, 96)
    nn.init.zeros_(layer.weight)
    assert not KINDS[kind](layer).dequantize(torch.float32).any()
    layer.weight.data[0, :64] = 1.0  # now NF4's quantised scales of the other blocks are inexact
    assert not KINDS[kind](layer).dequantize(torch.float32)[1:].any()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((896, 896), torch.bfloat16), ((128, 896), torch.float32), ((200, 4864), torch.bfloat16)],
)
def test_bits_and_errors_for_shapes_of_a_real_language_model(shape, dtype):
    layer = linear(*shape, dtype=dtype)
    nf4, int8 = NF4Linear(layer), Int8Linear(layer)
    for quantized, bits, error, within in ((nf4, 4.2, 0.092, 0.001), (int8, 8.1, 0.0075, 0.0015)):
        size = sum(buffer.nbytes for buffer in quantized.buffers())
        assert 8 * size / layer.weight.numel() <= bits
        assert relative_error(quantized, layer.weight) == pytest.approx(error, abs=within)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_output_and_input_gradient_equal_those_of_a_linear_layer(kind, shape, bias):
    plain = linear(*shape, bias=bias)
    layer = KINDS[kind](plain)
    plain.weight.data = layer.dequantize(torch.float32)
    inputs, outputs, gradients = torch.randn(2, 3, shape[1]), [], []
    for module in (plain, layer):
        leaf = inputs.clone().requires_grad_()
        outputs.append(module(leaf))
        outputs[-1].square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*outputs)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)
    without_gradient = all(parameter.grad is None for parameter in layer.parameters())
    assert without_gradient and layer(inputs).requires_grad is False


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_the_product_is_computed_in_its_dtype(kind):
    layer = KINDS[kind](linear(33, 100))
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(torch.randn(2, 100, requires_grad=True))
    assert output.dtype == torch.bfloat16
    rounded_once = layer.dequantize(torch.float32).bfloat16()
    assert layer.dequantize(torch.bfloat16).equal(rounded_once)


@pytest.mark.parametrize("compiled", [False, True])
def test_no_weight_matrix_is_saved_for_the_backward_pass(compiled):
    module, saved = nn.Sequential(nn.SiLU(), NF4Linear(linear(33, 100))), []
    if compiled:
        hide_from_compiler(module)
        module = torch.compile(module, backend="aot_eager")
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor
    ):
        module(torch.randn(2, 100, requires_grad=True)).sum().backward()
    assert set(saved) == {(2, 100)}


def test_a_matrix_dequantised_in_parts_is_the_same(monkeypatch):
    layers = [KINDS[kind](linear(130, 200)) for kind in KINDS]
    whole = [layer.dequantize(torch.float32) for layer in layers]
    monkeypatch.setattr("nanovlm.model.quantization.AT_ONCE", 1000)
    in_parts = [layer.dequantize(torch.float32) for layer in layers]
    assert all(map(torch.equal, in_parts, whole))


@pytest.mark.parametrize("kind", KINDS)
def test_casting_the_model_does_not_round_the_scales(kind):
    layer = KINDS[kind](linear(33, 100, bias=True))
    before = layer.dequantize(torch.float32)
    cast = copy.deepcopy(layer).to(torch.bfloat16)
    assert torch.equal(cast.dequantize(torch.float32), before)
    Precision(torch.bfloat16, torch.device("cpu")).place(layer)
    after = layer.dequantize(torch.float32)
    assert torch.equal(after, before) and layer.bias.dtype == torch.bfloat16


def test_all_linear_layers_of_the_blocks_are_quantised_and_the_head_is_not():
    config = LanguageModelConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=False,
    )
    model = LanguageModel(config)
    quantize_(model.blocks, "nf4", torch.device("cpu"))
    linear_layers = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear)
    ]
    quantised = [module for module in model.modules() if isinstance(module, NF4Linear)]
    assert linear_layers == ["lm_head"] and len(quantised) == 14
    assert not any("codes" in name for name in model.state_dict())
    model(torch.arange(10)[None])


def test_precision_moves_the_quantised_weights_to_its_device():
    layer = NF4Linear(linear(33, 100))
    Precision(torch.float32, torch.device("meta")).place(layer)
    assert {buffer.device.type for buffer in layer.buffers()} == {"meta"}


def decoded(kind: str, device: str = "cpu") -> list[torch.Tensor]:
    """Matrices of several shapes, the last one of zeros, in the dtypes that are computed in."""
    layers = [linear(*shape) for shape in [*SHAPES, (300, 896), (40, 64)]]
    nn.init.zeros_(layers[-1].weight)
    coded = [KINDS[kind](layer).to(device) for layer in layers]
    dtypes = (torch.bfloat16, torch.float32)
    return [layer.dequantize(dtype).cpu() for dtype in dtypes for layer in coded]


@pytest.mark.parametrize(("kind", "graphs_of_a_dtype"), [("nf4", 3), ("int8", 1)])
def test_a_captured_matrix_is_the_same_to_the_bit(monkeypatch, kind, graphs_of_a_dtype):
    """One graph for all sizes, and for NF4 two for what is less than a block, or 256 of them."""
    plain = decoded(kind)
    graphs = count_graphs(monkeypatch)
    assert all(map(torch.equal, decoded(kind), plain))
    assert graphs.captured == 2 * graphs_of_a_dtype


@pytest.mark.parametrize("kind", KINDS)
def test_training_generation_and_merging_share_a_graph(monkeypatch, kind):
    layer = KINDS[kind](linear(300, 128))
    graphs = count_graphs(monkeypatch)
    layer.dequantize(torch.float32)
    for mode in (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")):
        with mode():
            layer.dequantize(torch.float32)
    assert graphs.captured == 1


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4.13), ("int8", 8.0)])
def test_decoding_moves_the_codes_and_the_matrix_and_little_else(monkeypatch, kind, bits):
    layer = KINDS[kind](linear(1024, 1024))
    graphs = count_graphs(monkeypatch)
    layer.dequantize(torch.bfloat16)
    assert graphs.bytes == pytest.approx(1024 * 1024 * (bits / 8 + 2), rel=0.01)


@needs_cpp
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_matrix_is_the_same_to_the_bit_and_one_kernel(monkeypatch, kind):
    plain = decoded(kind)
    everywhere(monkeypatch)
    assert all(map(torch.equal, decoded(kind), plain))
    torch._dynamo.reset()
    torch._inductor.metrics.reset()
    KINDS[kind](linear(300, 512)).dequantize(torch.bfloat16)
    assert torch._inductor.metrics.generated_kernel_count == 1


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_compiled_matrix_serves_both_passes_in_blocks_that_are_compiled_or_computed_again(
    monkeypatch, compiled, checkpointed
):
    def passes() -> tuple[list[torch.Tensor], list[tuple[int, ...]]]:
        module = nn.Sequential(nn.SiLU(), NF4Linear(linear(33, 100)), nn.SiLU())
        if compiled:
            hide_from_compiler(module)
            module = torch.compile(module)
        saved, inputs = [], torch.linspace(-1, 1, 200).view(2, 100).requires_grad_()
        with (
            torch.autocast("cpu", torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: saved.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor
            ),
        ):
            run = (
                module
                if not checkpointed
                else lambda it: checkpoint(module, it, use_reentrant=False)
            )
            output = run(inputs)
        output.float().square().sum().backward()
        return [output.detach(), inputs.grad], saved

    with monkeypatch.context() as plain:
        count_graphs(plain)
        expected, saved_by_plain = passes()
    graphs = count_graphs(monkeypatch)
    ours, saved = passes()
    assert all(map(torch.equal, ours, expected))
    assert saved == saved_by_plain and (33, 100) not in saved
    assert graphs.captured >= 1


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_a_matrix_is_that_of_a_cpu_and_one_kernel(kind):
    for ours, expected in zip(decoded(kind, "cuda"), decoded(kind), strict=True):
        precision = 2**-7 if ours.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(ours, expected, rtol=precision, atol=1e-9)
    layer = KINDS[kind](linear(300, 896)).to("cuda")
    layer.dequantize(torch.bfloat16)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        layer.dequantize(torch.bfloat16)
        torch.cuda.synchronize()
    assert sum(event.count for event in profiled.key_averages()) <= 3
