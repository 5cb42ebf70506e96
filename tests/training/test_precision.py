"""The number format of each part, and the loss scaler."""

import gc
import math
import weakref

import pytest
import torch
from torch import Tensor, nn

from nanovlm.errors import NanoVLMError
from nanovlm.training.precision import LossScaler, Precision

CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))


def test_what_learns_stays_in_fp32_and_what_is_frozen_is_cast():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    Precision(torch.bfloat16, CPU).place(model)
    assert [layer.weight.dtype for layer in model] == [torch.bfloat16, torch.float32]
    assert (
        Precision(torch.bfloat16, CPU).scaler is None
        and Precision(torch.float16, CPU).scaler is not None
    )


def test_with_stochastic_rounding_what_learns_is_bf16_too_and_nothing_else_will_do():
    model = nn.Linear(2, 2)
    Precision(torch.bfloat16, CPU, stochastic_rounding=True).place(model)
    assert model.weight.dtype == model.bias.dtype == torch.bfloat16
    for dtype in (
        torch.float16,
        torch.float32,
    ):  # fp16's scaler could work, but its products would not be the weights' own
        with pytest.raises(NanoVLMError, match="--stochastic-rounding .* take --dtype bfloat16"):
            Precision(dtype, CPU, stochastic_rounding=True)


def test_gradients_in_bf16_are_clipped():
    weight = nn.Parameter(torch.zeros(100, dtype=torch.bfloat16))
    weight.grad = torch.full_like(weight, 3.0)
    assert float(torch.nn.utils.clip_grad_norm_([weight], 1.0)) == 30
    assert float(weight.grad.float().norm()) == pytest.approx(1, rel=0.01)


def test_autocast_holds_no_cast_copy_of_a_weight():
    """Its bytes are gone as soon as nothing needs them for the backward pass."""
    layer, inputs, kept = nn.Linear(8, 8), torch.ones(1, 8, requires_grad=True), []

    def look(tensor: Tensor) -> None:
        kept.append(weakref.ref(tensor))

    with Precision(torch.bfloat16, CPU).autocast():
        with torch.autograd.graph.saved_tensors_hooks(look, lambda nothing: nothing):
            layer(inputs)
        gc.collect()
        assert kept and not [
            ref for ref in kept if ref() is not None and ref().dtype == torch.bfloat16
        ]


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
    assert [step(1, 1), step(1, 1), scaler.scale, step(1, 1), scaler.scale] == [
        True,
        True,
        2.0,
        True,
        4.0,
    ]
    for _ in range(5):
        step(float("nan"), 0)
    assert scaler.scale == 1.0  # and never less
    assert scaler.unscale([nn.Parameter(torch.zeros(1))])  # no gradient at all is no overflow


@pytest.mark.parametrize(
    "saved",
    [
        [],
        {"scale": 0.0},
        {"scale": -1},
        {"scale": math.inf},
        {"scale": math.nan},
        {"scale": "2"},
        {"growth_interval": 0},
        {"good_steps": -1},
        {"good_steps": 1.5},
        {"factor": 2},
    ],
)
def test_a_damaged_loss_scaler_is_refused_by_name(saved):
    scaler = LossScaler(scale=8.0)
    with pytest.raises(NanoVLMError, match="^state.json: scaler"):
        scaler.restore(saved, "state.json: scaler")
    assert scaler == LossScaler(scale=8.0)
    scaler.restore({"scale": 4.0, "good_steps": 3}, "")
    assert scaler == LossScaler(scale=4.0, good_steps=3)
