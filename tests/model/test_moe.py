"""The mixture of experts against a loop over tokens, and the effect of its load-balance loss."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from nanovlm.model.layers import PlainMLP
from nanovlm.model.moe import MixtureOfExperts, load_balance

WIDTH = 12


def build(count: int = 4, per_token: int = 2, shared: int = 1) -> MixtureOfExperts:
    torch.manual_seed(0)
    experts = MixtureOfExperts(WIDTH, count, per_token, shared, partial(PlainMLP, WIDTH, 20, True))
    nn.init.normal_(experts.router.weight)
    return experts


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(1))


def naive(experts: MixtureOfExperts, hidden_states: Tensor, per_token: int) -> Tensor:
    """The mixture computed token by token and expert by expert."""
    rows = []
    for token in hidden_states.flatten(0, -2):
        likelihoods = (experts.router.weight @ token).softmax(dim=0)
        chosen = likelihoods.argsort(descending=True)[:per_token].tolist()
        total = sum(likelihoods[expert] for expert in chosen)
        row = sum(likelihoods[expert] / total * experts.experts[expert](token) for expert in chosen)
        rows.append(row + sum(expert(token) for expert in experts.shared_experts))
    return torch.stack(rows).view_as(hidden_states)


@pytest.mark.parametrize(
    "count, per_token, shared", [(4, 2, 1), (4, 1, 0), (3, 3, 2), (8, 3, 0), (1, 1, 1)]
)
def test_equals_a_loop_over_tokens_forwards_and_backwards(count, per_token, shared):
    experts, x = build(count, per_token, shared), tokens(3, 7).requires_grad_()
    factors, inputs, results = tokens(3, 7).flip(0), [x, *experts.parameters()], []
    for out in (experts(x), naive(experts, x, per_token)):
        gradients = torch.autograd.grad((out * factors).sum(), inputs, allow_unused=True)
        results.append([out, *gradients])
    for ours, expected in zip(*results):
        if expected is None:  # in the loop, an expert that no token chose is not part of the graph
            expected = torch.zeros(())
        torch.testing.assert_close(ours, expected.expand_as(ours), atol=1e-5, rtol=1e-5)


def test_an_expert_without_a_token_has_a_gradient_of_zero():
    experts = build(shared=0)
    experts(tokens(1))[0].sum().backward()
    gradients = [expert.up_proj.weight.grad for expert in experts.experts]
    all_present = all(gradient is not None for gradient in gradients)
    assert all_present and sum(bool(gradient.any()) for gradient in gradients) == 2


def test_an_input_without_tokens_gives_an_empty_output_and_a_loss_of_zero():
    experts = build()
    assert experts(tokens(0)).shape == (0, WIDTH) and experts.balance_loss.item() == 0


def test_a_token_does_not_depend_on_the_other_tokens():
    experts, x = build(), tokens(9)
    torch.testing.assert_close(experts(x)[:4], experts(x[:4]), atol=1e-6, rtol=0)


def test_the_balance_loss_is_one_for_an_even_load_and_above_one_otherwise():
    even = torch.eye(4).repeat(3, 1)
    pairs = (even + even.roll(1, dims=1)) / 2
    assert float(load_balance(even, even > 0, 1)) == pytest.approx(1)
    assert float(load_balance(pairs, pairs > 0, 2)) == pytest.approx(1)
    same = torch.tensor([0.5, 0.5, 0.0, 0.0]).repeat(12, 1)
    assert float(load_balance(same, same > 0, 2)) == pytest.approx(2)
    # By hand: of four choices, expert 0 has two, and experts 1 and 2 have one each.
    probabilities = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.1, 0.4]])
    taken = torch.tensor([[1, 1, 0], [1, 0, 1]]).bool()
    assert float(load_balance(probabilities, taken, 2)) == pytest.approx(
        3 * (0.5 * 0.55 + 0.25 * 0.2 + 0.25 * 0.25)
    )


def balance_of(
    experts: MixtureOfExperts, x: Tensor, counted: Tensor | None = None
) -> Tensor | None:
    experts.counted = counted
    experts(x)
    return experts.balance_loss


def test_padding_does_not_count_in_the_balance_loss():
    experts, x = build(), tokens(2, 5)
    present = torch.tensor([[True] * 5, [True, True, False, False, False]])
    x[1, 2:] = 100  # the values at padding
    balance, expected = balance_of(experts, x, present), balance_of(experts, x[present])
    torch.testing.assert_close(balance, expected)
    assert not torch.isclose(balance, balance_of(experts, x))


def test_minimising_the_balance_loss_evens_out_the_load():
    experts, x = build(), tokens(400)
    router = experts.router
    router.weight.data[0] += router.weight.data[1]
    optimizer = torch.optim.SGD(router.parameters(), lr=1.0)
    # All tokens share a direction for which the router prefers expert 0.
    x[:, 0] = 3
    router.weight.data[0, 0] += 2
    balances, loads = [], []
    for _ in range(60):
        balance = balance_of(experts, x)
        optimizer.zero_grad()
        balance.backward()
        assert router.weight.grad.any()
        optimizer.step()
        balances.append(float(balance.detach()))
        chosen = router(x).topk(2).indices.flatten().bincount(minlength=4)
        loads.append(int(chosen.max() - chosen.min()))
    assert balances[-1] < balances[0] - 0.2 and balances[-1] < 1.1
    assert loads[-1] < loads[0] / 2


def test_there_is_no_balance_loss_for_a_frozen_router_or_in_eval_mode():
    experts, x = build(), tokens(5)
    assert balance_of(experts, x) is not None
    experts.router.requires_grad_(False)
    assert balance_of(experts, x) is None
    experts.requires_grad_(True).eval()
    assert balance_of(experts, x) is None


def test_under_autocast_probabilities_and_balance_loss_stay_in_fp32():
    experts, x = build(), tokens(50)
    exact, exact_balance = experts(x), experts.balance_loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, balance = experts(x), experts.balance_loss
        assert experts.router(x).dtype == balance.dtype == torch.float32
    assert out.dtype == torch.bfloat16
    # Rounding changes the choice of experts for none of the 50 tokens.
    assert (out - exact).abs().mean() < 0.02 * exact.abs().mean()
    torch.testing.assert_close(balance, exact_balance, rtol=0.01, atol=0)
