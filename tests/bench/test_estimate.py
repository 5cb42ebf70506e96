"""The arithmetic of a step: what is counted, what a compiler merges, and how times add up."""

import math
import re
import sys

import pytest
import torch

from nanovlm.bench.__main__ import main
from nanovlm.bench.estimate import LAUNCH, REACHED, FusedKernel, step_seconds, works
from nanovlm.errors import NanoVLMError
from nanovlm.memory.predict import trace_step
from nanovlm.memory.shapes import batch_shape, model_config, prepared
from nanovlm.memory.simulation import simulated
from nanovlm.memory.trace import Trace
from nanovlm.training.monitor.flops import step_flops
from nanovlm.training.precision import Precision
from nanovlm.training.presets import load_settings
from nanovlm.utils.gpus import named_gpu

CUDA, GPU = torch.device("cuda"), named_gpu("rtx-4060")
BF16 = torch.bfloat16


def answer(monkeypatch, capsys, *flags: str) -> str:
    monkeypatch.setattr(sys, "argv", ["bench", *flags])
    main()
    return capsys.readouterr().out


def test_products_take_the_time_of_their_flops_and_sums_that_of_their_bytes():
    product, large_sum = (
        FusedKernel("forward", BF16, 3e6, 30.2e9),
        FusedKernel("forward", BF16, 272e6, 1e6),
    )
    assert product.seconds(GPU) == pytest.approx(1e-3 / REACHED)
    assert large_sum.seconds(GPU) == pytest.approx(1e-3 / REACHED)


def test_the_card_waits_for_launches_of_small_kernels_and_the_host_not_for_large_ones():
    small, large = (
        FusedKernel("forward", BF16, 10, 0),
        FusedKernel("forward", BF16, 272e6 * REACHED, 0),
    )
    assert step_seconds([small] * 1000, GPU) == pytest.approx(1000 * LAUNCH, rel=0.01)
    assert step_seconds([large] * 100, GPU) == pytest.approx(0.1, rel=0.01)
    assert step_seconds([large] * 100 + [small] * 1000, GPU) == pytest.approx(0.1, rel=0.01)


def test_a_compiled_region_is_one_kernel_between_products_and_moves_only_what_outlives_it():
    trace = Trace()
    with trace, simulated(CUDA, trace.compiled):
        x, matrix = torch.empty(64, 64), torch.empty(64, 64)
        y = ((x * 2).relu() + x) @ matrix
        with trace.compiled():
            z = (x * 2).relu() + x
            z = (z @ matrix).exp().sin()
    eager, fused = works(trace)[:4], works(trace)[4:]
    size = 64 * 64 * 4
    assert [work.bytes for work in eager] == [2 * size, 2 * size, 3 * size, 3 * size]
    assert [work.bytes for work in fused] == [2 * size, 3 * size, 2 * size]
    assert y.device == z.device == torch.device("meta")


def test_the_kernels_of_a_step_hold_the_flops_of_the_formula():
    """Of both counts, one made of shapes and one of the operations that ran."""
    settings = load_settings("stage2", ["--preset", "tiny"])
    config, precision = model_config(settings), Precision(BF16, CUDA)
    shape = batch_shape(config, settings)
    trace = trace_step(prepared(config, settings, precision), settings, shape, precision)
    counted = sum(kernel.flops for kernel in trace.kernels)
    expected = step_flops(prepared(config, settings, precision), shape)
    assert counted == pytest.approx(expected, rel=0.05)


def test_the_report(monkeypatch, capsys):
    flags = ("--preset", "tiny", "--stage", "2", "--batch-size", "8", "--dtype", "auto")
    text = answer(monkeypatch, capsys, "--estimate", "rtx-4060", *flags)
    assert text.startswith("RTX 4060: 30.2 TFLOP/s in half precision, 272 GB/s, 8.59 GB")
    assert re.search(r"stage2: training .*bfloat16, blocks compiled\n", text)
    rows = dict(re.findall(r"^(forward|backward|update) +([\d,]+)", text, re.MULTILINE))
    plain = answer(monkeypatch, capsys, "--estimate", "rtx-4060", *flags, "--no-compile")
    for part, kernels in re.findall(r"^(forward|backward) +([\d,]+)", plain, re.MULTILINE):
        assert int(kernels.replace(",", "")) > 1.4 * int(rows[part].replace(",", ""))
    assert "1,000 steps take" in text and ": fits" in text
    counted = answer(monkeypatch, capsys, "--estimate", "rtx-4060", *flags, "--records", "800")
    steps = math.ceil(800 * load_settings("stage2", ["--preset", "tiny"]).epochs / 8)
    assert f"\n{steps} steps take" in counted


def test_a_card_without_bf16_computes_in_fp16(monkeypatch, capsys):
    flags = ("--preset", "tiny", "--stage", "2")
    assert ", float16" in answer(monkeypatch, capsys, "--estimate", "t4", *flags, "--dtype", "auto")
    with pytest.raises(NanoVLMError, match="no products in bf16"):
        answer(monkeypatch, capsys, "--estimate", "t4", *flags, "--dtype", "bfloat16")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--estimate", "rtx-9999"), "not among"),
        (("--estimate", "rtx-4060", "--weights", "here"), "unrecognized"),
        (("--estimate", "rtx-4060", "--tokens", "-1"), "--tokens is -1"),
        ((), "--weights"),
        (("--weights", "here", "--tokens", "8"), "belongs to --estimate"),
    ],
)
def test_wrong_flags_are_one_line(monkeypatch, capsys, flags: tuple[str, ...], message: str):
    with pytest.raises(NanoVLMError, match=message) as caught:
        answer(monkeypatch, capsys, *flags)
    assert "\n" not in str(caught.value)
