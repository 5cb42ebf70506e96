"""The number format of each part, and the loss scaler."""

import pytest
import torch
from torch import nn

from nanovlm.training.precision import LossScaler, Precision

CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))


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
