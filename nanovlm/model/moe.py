"""A mixture of experts in the place of one MLP: many weights, of which each token passes few."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Router(nn.Linear):
    """How likely each expert is for each token: (N, C) → (N, experts) probabilities in fp32. A class of its own, so that
    quantisation, which takes plain linear layers, leaves this small and touchy one alone."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__(width, count, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens).softmax(dim=-1, dtype=torch.float32)


class MixtureOfExperts(nn.Module):
    """Of `count` MLPs a router chooses `per_token` for each token (Shazeer et al. 2017); `shared` more serve all tokens
    (Dai et al. 2024: DeepSeekMoE).

    What comes out is Σ w_i · expert_i(x) over the chosen, plus the shared ones' outputs. The w_i are the router's
    probabilities, divided by their sum over the chosen. `build` makes one MLP, (N, C) → (N, C).
    """

    def __init__(
        self, width: int, count: int, per_token: int, shared: int, build: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.per_token = per_token
        self.router = Router(width, count)
        self.experts = nn.ModuleList(build() for _ in range(count))
        self.shared_experts = nn.ModuleList(build() for _ in range(shared))

    def forward(
        self, hidden_states: Tensor, present: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(…, C) → (…, C), and in training the load-balance loss over the tokens where `present` (…) is true, a scalar.

        There is no such loss where the router does not learn: it would only bend what learns below towards a choice
        that nobody made.
        """
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        probabilities = self.router(tokens)  # (N, E)
        weights, chosen = probabilities.topk(self.per_token, dim=-1)  # (N, k)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        taken = torch.zeros_like(probabilities, dtype=torch.bool).scatter_(
            1, chosen, True
        )  # (N, E)
        mixed = self.mix(tokens, weights, chosen, taken)
        for expert in self.shared_experts:
            mixed = mixed + expert(tokens)
        learns = self.training and any(
            parameter.requires_grad for parameter in self.router.parameters()
        )
        balance = load_balance(probabilities, taken, self.per_token, present) if learns else None
        return mixed.view_as(hidden_states), balance

    def mix(self, tokens: Tensor, weights: Tensor, chosen: Tensor, taken: Tensor) -> Tensor:
        """Sort the choices by expert, multiply each expert's tokens at once, and put the results back in order.

        The counts are read from the device, once a layer; they are no shapes that a compiler could know. An expert without
        a token runs on none, so that its gradient is zero and not missing.
        """
        order = chosen.flatten().argsort(stable=True)  # of the N · k choices
        pieces = tokens.index_select(0, order // self.per_token).split(taken.sum(dim=0).tolist())
        outputs = torch.cat([expert(piece) for expert, piece in zip(self.experts, pieces)])
        outputs = outputs.index_select(0, order.argsort()).unflatten(0, chosen.shape)  # (N, k, C)
        return (outputs * weights.to(outputs.dtype)[..., None]).sum(dim=1)


def load_balance(
    probabilities: Tensor, taken: Tensor, per_token: int, present: Tensor | None = None
) -> Tensor:
    """E · Σ f_i · P_i (Fedus et al. 2021, Switch Transformer), for k experts a token instead of one: 1 where all of E
    experts are equally busy, and E / k where all tokens go to the same k alone.

    `probabilities` and `taken`, k of which are true in a row, are (N, E); `present` is any shape of N truth values: tokens
    that count (None: all). f_i, the share of choices that fell on expert i, is a count; the gradient goes through P_i, its
    mean probability.
    """
    counted = taken.new_ones(len(taken)) if present is None else present.flatten()
    weights = (counted / counted.sum().clamp(min=1))[:, None]  # (N, 1)
    load = (taken * weights).sum(dim=0) / per_token
    return len(load) * (load * (probabilities * weights).sum(dim=0)).sum()
