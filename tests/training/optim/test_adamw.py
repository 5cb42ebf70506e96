"""AdamW in less memory: the published update, the error of 8 bits, rounding with an exact mean."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nanovlm.model.language_model import LanguageModel, LanguageModelConfig
from nanovlm.model.loss import chunked_cross_entropy
from nanovlm.training.optim import adamw
from nanovlm.training.optim.adamw import SMALLEST, LeanAdamW, moment_bytes, stochastic_round
from nanovlm.training.optim.eight_bit import BLOCK, dequantize, quantize, tables

CHOICES = [
    dict(eight_bit=eight_bit, stochastic_rounding=rounding)
    for eight_bit in (False, True)
    for rounding in (False, True)
]


@pytest.fixture(autouse=True)
def short_slices(monkeypatch):
    """Small parameters take several slices, too, of which the last is shorter than a block."""
    monkeypatch.setattr(adamw, "SLICE", 1024)


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for shape in ((75, 75), (33, 5), (7,))
    ]


def take_steps(
    trainable: list[nn.Parameter], optimizer: torch.optim.Optimizer, count: int, first: int = 0
) -> None:
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        for parameter in trainable:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("beta2", [0.0, 0.95, 0.999])
def test_with_moments_in_fp32_it_is_adamw(beta2):
    ours, theirs = parameters(), parameters()
    options = dict(lr=0.01, betas=(0.9, beta2), weight_decay=0.1)
    take_steps(ours, LeanAdamW(ours, **options), 20)
    take_steps(theirs, torch.optim.AdamW(theirs, **options), 20)
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


def test_eight_bits_follow_the_written_out_formula():
    ours, (weights, *_) = parameters(), parameters()
    optimizer = LeanAdamW(ours, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, eight_bit=True)
    weights = weights.detach().flatten()

    def coded(values: Tensor, signed: bool) -> Tensor:
        """What is left of `values` after coding; zeros at the end change nothing."""
        blocks = nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
        coding = tables(signed)
        return dequantize(*quantize(blocks, coding), coding).view(-1)[: len(values)]

    average = square = torch.zeros_like(weights)
    for step in range(1, 6):
        take_steps(ours, optimizer, 1, first=step)
        gradient = ours[0].grad.flatten()
        average, square = 0.9 * average + 0.1 * gradient, 0.95 * square + 0.05 * gradient**2
        weights = weights * (1 - 0.01 * 0.1)
        weights -= 0.01 * (average / (1 - 0.9**step)) / ((square / (1 - 0.95**step)).sqrt() + 1e-8)
        average, square = coded(average, True), coded(square, False)
    # A moment on the border between two codes may fall either way; almost all agree.
    difference = (ours[0].detach().flatten() - weights).abs()
    assert difference.median() < 1e-7 and (difference > 1e-6).sum() < 10 and difference.max() < 1e-3
    state = optimizer.state[ours[0]]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.uint8 and state[
        "exp_avg"
    ].shape == (75, 75)
    assert all(
        optimizer.state[small]["exp_avg"].dtype == torch.float32 for small in ours[1:]
    )  # too small to gain


def decoder_losses(choice: dict | None, steps: int = 40) -> Tensor:
    """The mean loss of each step of a small language model that overfits 16 sequences."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if choice and choice["stochastic_rounding"] else torch.float32
    decoder = LanguageModel(
        LanguageModelConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
        )
    ).to(dtype)
    ids = torch.randint(128, (16, 13), generator=torch.Generator().manual_seed(1))
    options = dict(lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    optimizer = (
        LeanAdamW(decoder.parameters(), **options, **choice)
        if choice
        else torch.optim.AdamW(decoder.parameters(), **options)
    )
    losses = []
    for _ in range(steps):
        hidden_states = decoder.hidden_states(decoder.embed_tokens(ids[:, :-1])).flatten(0, 1)
        loss = (
            chunked_cross_entropy(hidden_states, decoder.head_weight, ids[:, 1:].flatten())
            / ids[:, 1:].numel()
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_every_choice_follows_the_loss_curve_of_adamw(monkeypatch):
    """From 4.9 down to a fifth of it in 40 steps, and never further from AdamW's than stated."""
    monkeypatch.setattr(adamw, "SLICE", 2**20)
    expected = decoder_losses(None)
    assert expected[0] > 4.8 and expected[-1] < 1.2
    for choice, tolerance in zip(CHOICES, (1e-4, 0.03, 0.01, 0.03)):
        assert (decoder_losses(choice) - expected).abs().max() < tolerance


def test_rounding_is_right_on_average_and_goes_only_to_neighbours():
    torch.manual_seed(0)
    values = torch.tensor([1.0 + 2**-9, 1.0 + 2**-7 * 0.9, -3.1, 1e-30, 1.5, 0.0, -2.0])
    rounded = stochastic_round(values.expand(100_000, -1).contiguous()).double()
    spacing = 2.0 ** (
        values.double().abs().clamp(min=1e-45).log2().floor() - 7
    )  # bf16 has 8 significant bits
    error = rounded - values.double()
    assert (error.abs() < spacing).all()
    assert (
        error.mean(dim=0).abs() < 5 * 0.5 * spacing / math.sqrt(100_000)
    ).all()  # five standard errors
    assert torch.equal(
        rounded[:, 4:], values[4:].double().expand(100_000, -1)
    )  # what bf16 holds stays as it is


def test_rounding_leaves_what_is_not_finite():
    values = torch.tensor([math.inf, -math.inf, math.nan]).repeat(1000)
    other_nans = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    values = torch.cat([values, other_nans])
    rounded = stochastic_round(values)
    assert torch.equal(rounded.isnan(), values.isnan())
    assert torch.equal(rounded[~values.isnan()].float(), values[~values.isnan()])


@pytest.mark.parametrize("eight_bit", [False, True])
def test_steps_too_small_for_bf16_are_learned(eight_bit):
    moved = {}
    for rounding in (False, True):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.ones(SMALLEST, dtype=torch.bfloat16))
        optimizer = LeanAdamW([weight], lr=1e-4, eight_bit=eight_bit, stochastic_rounding=rounding)
        for _ in range(50):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[rounding] = 1 - weight.detach().double().mean().item()
    assert moved[False] == 0
    assert moved[True] == pytest.approx(50 * 1e-4, rel=0.05)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_state_is_tensors_of_the_promised_size_and_with_the_random_state_continues_to_the_same_bits(
    choice,
):
    dtype = torch.bfloat16 if choice["stochastic_rounding"] else torch.float32
    torch.manual_seed(0)
    ours = parameters(dtype)
    optimizer = LeanAdamW(ours, lr=0.01, **choice)
    take_steps(ours, optimizer, 3)
    copies = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    other, random_state = LeanAdamW(copies, lr=0.01, **choice), torch.get_rng_state()
    for parameter, copy in zip(ours, copies):
        state = optimizer.state[parameter]
        assert (
            sum(tensor.nbytes for tensor in state.values())
            == moment_bytes(parameter, choice["eight_bit"]) + 4
        )
        other.state[copy] = {kind: tensor.clone() for kind, tensor in state.items()}
    take_steps(ours, optimizer, 3, first=3)
    torch.set_rng_state(random_state)
    take_steps(copies, other, 3, first=3)
    assert all(torch.equal(one, two) for one, two in zip(ours, copies))


def test_a_large_parameter_is_never_copied_whole(monkeypatch):
    """The largest tensor that a step makes is a slice, however large the parameter."""

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and not known.intersection(
                {out.untyped_storage().data_ptr()}
            ):
                Largest.bytes = max(Largest.bytes, out.nbytes)
            return out

    monkeypatch.setattr(adamw, "SLICE", 4096)
    weight = nn.Parameter(torch.ones(64, 1024, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    optimizer = LeanAdamW([weight], eight_bit=True, stochastic_rounding=True)
    optimizer.step()
    known = {
        tensor.untyped_storage().data_ptr()
        for tensor in (weight, weight.grad, *optimizer.state[weight].values())
    }
    with Largest():
        optimizer.step()
    assert 0 < Largest.bytes <= 4 * 4096


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("first", [0, 3])
def test_a_step_that_is_not_finite_changes_nothing(choice, first):
    trainable = parameters(torch.bfloat16 if choice["stochastic_rounding"] else torch.float32)
    optimizer = LeanAdamW(trainable, lr=0.01, weight_decay=0.1, **choice)
    take_steps(trainable, optimizer, first)
    before = [parameter.detach().clone() for parameter in trainable]
    states = [
        {kind: tensor.clone() for kind, tensor in optimizer.state[parameter].items()}
        for parameter in trainable
    ]
    optimizer.found_inf = torch.tensor(1.0)
    for parameter in trainable:
        parameter.grad = torch.full_like(parameter, math.nan)
    optimizer.step()
    for parameter, old, state in zip(trainable, before, states, strict=True):
        assert torch.equal(parameter, old)
        for kind, tensor in optimizer.state[parameter].items():
            assert torch.equal(tensor, state[kind] if first else torch.zeros_like(tensor))
    optimizer.found_inf = torch.tensor(0.0)
    take_steps(trainable, optimizer, 1, first=first)
    assert all(
        parameter.isfinite().all() and not torch.equal(parameter, old)
        for parameter, old in zip(trainable, before)
    )
