"""Tensors without contents behave as on the device that is simulated, and leave nothing behind."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nanovlm.memory import simulation
from nanovlm.memory.simulation import simulated
from nanovlm.memory.trace import Trace
from nanovlm.training.optim.eight_bit import quantize, tables

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HEADER = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
# Functions of Python under the names of the operations that they stand for.
OPERATIONS = {
    "__matmul__": "matmul",
    "__pow__": "pow",
    "square": "pow",
    "interpolate": "upsample_bicubic2d",
    "vector_norm": "linalg_vector_norm",
    "norm": "linalg_vector_norm",
}


@pytest.mark.skipif(not HEADER.exists(), reason="needs PyTorch's C++ headers")
@pytest.mark.parametrize(
    ("names", "lists"),
    [
        (simulation.COMPUTE_DTYPE, ("LOWER_PRECISION_FP",)),
        (simulation.FP32["cuda"], ("FP32", "FP32_SET_OPT_DTYPE")),
        (simulation.WIDEST["cuda"], ("PROMOTE",)),
    ],
    ids=["compute dtype", "fp32", "widest"],
)
def test_the_lists_of_autocast_are_pytorchs(names: set[str], lists: tuple[str, ...]):
    text = HEADER.read_text()
    listed = set()
    for name in lists:
        body = re.search(rf"#define AT_FORALL_{name}\(_\)(.*?)\n\n", text, re.DOTALL)[1]
        listed |= set(re.findall(r"_\((\w+)", body))
    assert {OPERATIONS.get(name, name) for name in names} - listed == set()


def test_tensors_look_as_on_the_device_and_are_cast_by_its_rules():
    def dtypes(device: torch.device) -> dict[str, torch.dtype]:
        with simulated(device), torch.autocast(device.type, dtype=torch.bfloat16):
            x, weight = torch.empty(2, 3, 64), torch.empty(64, 64)
            assert x.device == device and x.is_cuda == (device.type == "cuda")
            half = x.bfloat16()
            results = {
                "product": half @ weight,
                "linear": F.linear(x, weight),
                "norm": F.layer_norm(half, (64,)),
                "sum": half.sum(),
                "sum in bf16": half.sum(dtype=torch.bfloat16),
                "joined": torch.cat([x, half]),
            }
            return {name: result.dtype for name, result in results.items()}

    bf16, fp32 = torch.bfloat16, torch.float32
    on_cpu = {"product": bf16, "linear": bf16, "norm": bf16, "sum": bf16, "sum in bf16": bf16}
    assert dtypes(CPU) == {**on_cpu, "joined": fp32}
    assert dtypes(CUDA) == {**on_cpu, "norm": fp32, "sum": fp32, "joined": fp32}
    real = torch.ones(2, 64, dtype=bf16)
    with torch.autocast("cpu", dtype=bf16):  # as PyTorch has it
        assert F.layer_norm(real, (64,)).dtype == real.sum().dtype == bf16


@pytest.mark.parametrize(
    ("dtype", "masked", "heads", "kernel"),
    [
        (torch.bfloat16, False, 2, "flash"),
        (torch.bfloat16, True, 4, "efficient"),
        (torch.bfloat16, True, 2, "math"),
        (torch.float32, False, 4, "efficient"),
        (torch.float32, False, 2, "math"),
    ],
)
def test_the_kernel_of_attention(dtype: torch.dtype, masked: bool, heads: int, kernel: str):
    with simulated(CUDA) as device:
        queries = torch.empty(2, 4, 16, 8, dtype=dtype, requires_grad=True)
        keys = torch.empty(2, heads, 16, 8, dtype=dtype)
        mask = torch.empty(2, 1, 16, 16, dtype=dtype) if masked else None
        attended = F.scaled_dot_product_attention(
            queries, keys, keys, attn_mask=mask, enable_gqa=heads != 4
        )
        attended.sum().backward()
    assert device.attention_kernels == [kernel]
    assert attended.shape == queries.grad.shape == queries.shape


def test_the_backward_pass_sees_the_device_too():
    seen = []

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values):
            return values.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append((grad.device.type, torch.ones(1).is_meta))
            return grad

    with simulated(CUDA):
        Function.apply(torch.empty(3, requires_grad=True)).sum().backward()
    assert seen == [("cuda", True)]


def test_constants_made_before_and_within_do_not_meet():
    values = torch.randn(2, 256)
    before = quantize(values, tables(True))
    with simulated(CPU):
        quantize(torch.empty(2, 256), tables(True, CPU))
    for one, other in zip(before, quantize(values, tables(True, CPU))):
        assert torch.equal(one, other)


def test_a_trace_counts_tensors_from_the_first_use_to_the_last():
    trace = Trace()
    with trace, simulated(CPU):
        kept = torch.empty(1000)
        trace.begin("work")
        dropped = kept + 1
        product = dropped * 2
        del dropped
        trace.begin("rest")
        product.add_(1)
        view = product[:10]
    assert trace.bytes_at(trace.peaks()["work"]) == 3 * 4000
    assert trace.bytes_at(trace.peaks()["rest"]) == 2 * 4000
    assert [kernel.name for kernel in trace.kernels] == ["add", "mul", "add_"]
    assert view.shape == (10,)


def test_what_a_compiled_region_drops_takes_no_memory():
    trace = Trace()
    with trace, simulated(CPU):
        values = torch.empty(1000)
        trace.begin("compiled")
        with trace.compiled():
            result = (values + 1) * 2
    assert trace.bytes_at(trace.peaks()["compiled"]) == 2 * 4000
    assert result.shape == (1000,)
