"""The choice of device and number format, and the loss scaler."""

import pytest
import torch
from torch import nn

from nanovlm.errors import NanoVLMError
from nanovlm.training.precision import LossScaler, Precision, choose_device, choose_dtype

CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))


def test_the_best_device_is_chosen_and_an_absent_one_refused(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device() == CUDA and choose_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device() == MPS
    with pytest.raises(NanoVLMError, match="'cuda' is not available here; take one of mps, cpu"):
        choose_device("cuda")


@pytest.mark.parametrize("asked", ["auto", "bf16"])
def test_bf16_where_it_is_fast_and_a_sentence_where_it_is_not(monkeypatch, asked):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": True})
    assert choose_dtype(asked, CPU) == (torch.bfloat16, "")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    assert choose_dtype(asked, CPU) == (torch.float32, "cpu has no fast bf16 here, using fp32")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert choose_dtype(asked, CUDA) == (torch.float16, "cuda has no fast bf16 here, using fp16")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert choose_dtype(asked, CUDA) == (torch.bfloat16, "")
    assert choose_dtype(asked, MPS)[0] == torch.float32 and "mps" in choose_dtype(asked, MPS)[1]
    assert choose_dtype("fp16", CPU) == (torch.float16, "") and choose_dtype("fp32", CUDA) == (torch.float32, "")


def test_what_learns_stays_in_fp32_and_what_is_frozen_is_cast():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    Precision(torch.bfloat16, CPU).place(model)
    assert [layer.weight.dtype for layer in model] == [torch.bfloat16, torch.float32]
    assert Precision(torch.bfloat16, CPU).scaler is None and Precision(torch.float16, CPU).scaler is not None


def test_scaled_gradients_come_back_unscaled():
    precision, weight = Precision(torch.float16, CPU), nn.Parameter(torch.tensor([1.0, 2.0]))
    precision.scaled((weight * torch.tensor([3.0, 4.0])).sum()).backward()
    assert weight.grad.tolist() == [3 * 2.0**16, 4 * 2.0**16]
    assert precision.scaler.unscale([weight])
    assert weight.grad.tolist() == [3.0, 4.0]


def test_an_overflow_halves_the_factor_and_good_steps_double_it():
    weight, scaler = nn.Parameter(torch.zeros(2)), LossScaler(scale=8.0, growth_interval=3)

    def step(*gradient: float) -> bool:
        weight.grad = torch.tensor(gradient, dtype=torch.float32)
        return scaler.unscale([weight])

    assert [step(1, 1), step(1, 1), scaler.scale] == [True, True, 8.0]
    assert [step(float("inf"), 1), scaler.scale, scaler.good_steps] == [False, 4.0, 0]
    assert [step(1, float("nan")), scaler.scale] == [False, 2.0]
    assert [step(1, 1), step(1, 1), scaler.scale, step(1, 1), scaler.scale] == [True, True, 2.0, True, 4.0]
    for _ in range(5):
        step(float("nan"), 0)
    assert scaler.scale == 1.0  # and never less
    assert scaler.unscale([nn.Parameter(torch.zeros(1))])  # no gradient at all is no overflow
