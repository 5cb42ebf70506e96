"""The mixture of experts against a loop over tokens, and what its load-balance loss does."""

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
    """Token by token, expert by expert."""
    rows = []
    for token in hidden_states.flatten(0, -2):
        likelihoods = (experts.router.weight @ token).softmax(dim=0)
        chosen = sorted(
            range(len(experts.experts)), key=lambda expert: -likelihoods[expert].item()
        )[:per_token]
        total = sum(likelihoods[expert] for expert in chosen)
        row = sum(likelihoods[expert] / total * experts.experts[expert](token) for expert in chosen)
        rows.append(row + sum(expert(token) for expert in experts.shared_experts))
    return torch.stack(rows).view_as(hidden_states)


@pytest.mark.parametrize(
    "count, per_token, shared", [(4, 2, 1), (4, 1, 0), (3, 3, 2), (8, 3, 0), (1, 1, 1)]
)
def test_equals_a_loop_over_tokens_forwards_and_backwards(count, per_token, shared):
    experts, x = build(count, per_token, shared), tokens(3, 7).requires_grad_()
    factors, results = tokens(3, 7).flip(0), []
    for out in (experts(x), naive(experts, x, per_token)):
        gradients = torch.autograd.grad(
            (out * factors).sum(), [x, *experts.parameters()], allow_unused=True
        )
        results.append(
            [out, *(torch.zeros(()) if gradient is None else gradient for gradient in gradients)]
        )
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected.expand_as(ours), atol=1e-5, rtol=1e-5)


def test_an_expert_without_a_token_has_a_gradient_of_zero():
    experts = build(shared=0)
    experts(tokens(1))[0].sum().backward()
    gradients = [expert.up_proj.weight.grad for expert in experts.experts]
    assert sum(bool(gradient.any()) for gradient in gradients) == 2 and all(
        gradient is not None for gradient in gradients
    )


def test_no_token_at_all_is_none_at_the_end_too():
    experts = build()
    assert experts(tokens(0)).shape == (0, WIDTH) and experts.balance_loss.item() == 0


def test_what_other_tokens_are_there_changes_nothing():
    experts, x = build(), tokens(9)
    torch.testing.assert_close(experts(x)[:4], experts(x[:4]), atol=1e-6, rtol=0)


def test_the_balance_is_one_where_all_are_equally_busy_and_more_where_not():
    even = torch.eye(4).repeat(3, 1)
    pairs = (even + even.roll(1, dims=1)) / 2
    assert float(load_balance(even, even > 0, 1)) == pytest.approx(1)
    assert float(load_balance(pairs, pairs > 0, 2)) == pytest.approx(1)
    same = torch.tensor([0.5, 0.5, 0.0, 0.0]).repeat(12, 1)
    assert float(load_balance(same, same > 0, 2)) == pytest.approx(2)
    # By hand: of four choices expert 0 has two, expert 1 and 2 one each.
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


def test_only_tokens_that_are_present_count():
    experts, x = build(), tokens(2, 5)
    present = torch.tensor([[True] * 5, [True, True, False, False, False]])
    x[1, 2:] = 100  # what padding is does not matter
    balance, expected = balance_of(experts, x, present), balance_of(experts, x[present])
    torch.testing.assert_close(balance, expected)
    assert not torch.isclose(balance, balance_of(experts, x))


def test_the_balance_reaches_the_router_and_makes_the_load_even():
    experts, x = build(), tokens(400)
    experts.router.weight.data[0] += experts.router.weight.data[
        1
    ]  # and nothing else of the model has a say
    optimizer = torch.optim.SGD(experts.router.parameters(), lr=1.0)
    x[:, 0] = 3  # a direction that all tokens share, and a router that likes it
    experts.router.weight.data[0, 0] += 2
    balances, loads = [], []
    for _ in range(60):
        balance = balance_of(experts, x)
        optimizer.zero_grad()
        balance.backward()
        assert experts.router.weight.grad.any()
        optimizer.step()
        balances.append(float(balance.detach()))
        chosen = experts.router(x).topk(2).indices.flatten().bincount(minlength=4)
        loads.append(int(chosen.max() - chosen.min()))
    assert balances[-1] < balances[0] - 0.2 and balances[-1] < 1.1
    assert loads[-1] < loads[0] / 2


def test_there_is_no_balance_where_nothing_learns():
    experts, x = build(), tokens(5)
    assert balance_of(experts, x) is not None
    experts.router.requires_grad_(False)
    assert balance_of(experts, x) is None
    experts.requires_grad_(True).eval()
    assert balance_of(experts, x) is None


def test_under_autocast_probabilities_and_balance_stay_in_fp32():
    experts, x = build(), tokens(50)
    exact, exact_balance = experts(x), experts.balance_loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, balance = experts(x), experts.balance_loss
        assert experts.router(x).dtype == balance.dtype == torch.float32
    assert out.dtype == torch.bfloat16
    assert (
        (out - exact).abs().mean() < 0.02 * exact.abs().mean()
    )  # of 50 tokens none sits so near a border that it errs
    torch.testing.assert_close(balance, exact_balance, rtol=0.01, atol=0)
