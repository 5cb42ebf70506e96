"""Which parameters the optimizer updates, their learning rates, and which of them decay."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nanovlm.hub.models import load_model
from nanovlm.training.freezing import freeze
from nanovlm.training.optim.optimizer import (
    build_optimizer,
    schedule,
    set_learning_rates,
    state_bytes,
)
from nanovlm.training.precision import Precision
from nanovlm.training.settings import Settings


@pytest.fixture
def model(tiny):
    return load_model(tiny.model)


def test_one_learning_rate_for_each_part_and_decay_for_matrices_alone(model):
    freeze(model, Settings(train="projector,language_model,vision_encoder"))
    settings = Settings(
        lr=1e-3, lr_language_model=1e-4, lr_vision_encoder=1e-5, weight_decay=0.1, beta2=0.9
    )
    optimizer = build_optimizer(model, settings)
    names = {parameter: name for name, parameter in model.named_parameters()}
    grouped = [
        names[parameter] for group in optimizer.param_groups for parameter in group["params"]
    ]
    assert sorted(grouped) == sorted(names.values())  # each once
    peaks = {"projector": 1e-3, "language_model": 1e-4, "vision_encoder": 1e-5}
    for group in optimizer.param_groups:
        assert group["peak_lr"] == peaks[group["part"]] and group["betas"] == (0.9, 0.9)
        for parameter in group["params"]:
            name = names[parameter]
            assert name.startswith(group["part"])
            assert group["weight_decay"] == (0.1 if parameter.dim() > 1 else 0.0)
            if "norm" in name or name.endswith("bias") or "scale" in name:
                assert group["weight_decay"] == 0
    set_learning_rates(optimizer, 0.5)
    assert {group["part"]: group["lr"] for group in optimizer.param_groups} == {
        part: lr / 2 for part, lr in peaks.items()
    }


def test_what_follows_the_last_block_has_the_rate_of_the_output():
    encoder = nn.Module()
    encoder.blocks, encoder.norm, encoder.resampler, encoder.patch_embedding = (
        nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]),
        nn.LayerNorm(2),
        nn.Linear(2, 2),
        nn.Linear(2, 2),
    )
    model = nn.Module()
    model.vision_encoder, model.projector, model.language_model = encoder, nn.Module(), nn.Module()
    model.config = SimpleNamespace(vision_depth=2)
    rates = {
        id(parameter): group["peak_lr"]
        for group in build_optimizer(model, Settings(lr=1.0, layer_decay=0.5)).param_groups
        for parameter in group["params"]
    }
    assert [
        rates[id(module.weight)]
        for module in (
            encoder.resampler,
            encoder.norm,
            encoder.blocks[1],
            encoder.blocks[0],
            encoder.patch_embedding,
        )
    ] == [1.0, 1.0, 1.0, 0.5, 0.25]


def test_the_schedule_rises_linearly_then_falls_along_a_cosine():
    shares = [schedule(step, 110, warmup=10 / 110, min_lr=0.1) for step in range(110)]
    assert shares[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert shares[10] == 1 and shares[60] == pytest.approx(
        0.55
    )  # half-way down, half-way between 1 and 0.1
    assert shares[35] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert shares[10:] == sorted(shares[10:], reverse=True) and 0.1 < shares[-1] < 0.101
    assert (
        schedule(0, 1, 0.03, 0.1) == 1 and schedule(0, 100, 0.0, 0.1) == 1
    )  # never a step of nothing
    assert schedule(500, 100, 0.03, 0.1) == pytest.approx(0.1)


def test_matrices_shrink_without_gradients_and_vectors_do_not(model):
    freeze(model, Settings(train="projector"))
    optimizer = build_optimizer(model, Settings(weight_decay=0.5, lr=0.1))
    set_learning_rates(optimizer, 1.0)
    before = {
        name: parameter.detach().clone() for name, parameter in model.projector.named_parameters()
    }
    for parameter in model.projector.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.projector.named_parameters():
        torch.testing.assert_close(
            parameter.detach(), before[name] * (0.95 if parameter.dim() > 1 else 1.0)
        )


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("stochastic_rounding", [False, True])
def test_the_state_has_the_predicted_bytes(model, optimizer, stochastic_rounding):
    settings = Settings(
        train="projector,language_model,vision_encoder",
        optimizer=optimizer,
        stochastic_rounding=stochastic_rounding,
    )
    freeze(model, settings)
    Precision(torch.bfloat16, torch.device("cpu"), stochastic_rounding).place(model)
    built = build_optimizer(model, settings)
    assert isinstance(built, torch.optim.AdamW) == (
        optimizer == "adamw" and not stochastic_rounding
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    built.step()
    for parameter in model.parameters():
        assert sum(tensor.nbytes for tensor in built.state[parameter].values()) == state_bytes(
            parameter, settings
        )
    assert {tensor.dtype for state in built.state.values() for tensor in state.values()} == (
        {torch.float32, torch.uint8} if optimizer == "adamw8bit" else {torch.float32}
    )
