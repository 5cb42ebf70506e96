"""A mixture of experts in the place of one MLP: many weights, of which each token uses few."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Router(nn.Linear):
    """The probability of each expert for each token.

    A class of its own, so that quantisation, which replaces plain linear layers, leaves this small
    and sensitive one.
    """

    def __init__(self, width: int, count: int) -> None:
        super().__init__(width, count, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, C) → (N, experts) in fp32."""
        return super().forward(tokens).softmax(dim=-1, dtype=torch.float32)


class MixtureOfExperts(nn.Module):
    """For each token a router chooses `per_token` of `count` MLPs (Shazeer et al. 2017).

    `shared` more serve all tokens (Dai et al. 2024: DeepSeekMoE). The output is Σ w_i · expert_i(x)
    over the chosen experts, plus the outputs of the shared ones. The weights w_i are the router's
    probabilities, divided by their sum over the chosen. `build` makes one MLP, (N, C) → (N, C).

    In training, `balance_loss` holds the load-balance loss of the last forward pass, a scalar,
    where the router is trainable; where it is frozen, the loss would only bend what lies below. It
    counts the tokens where `counted` is true, a tensor of the shape (…) of the input without its
    last dimension; None counts all.
    """

    def __init__(
        self, width: int, count: int, per_token: int, shared: int, build: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.per_token = per_token
        self.router = Router(width, count)
        self.experts = nn.ModuleList(build() for _ in range(count))
        self.shared_experts = nn.ModuleList(build() for _ in range(shared))
        self.counted: Tensor | None = None
        self.balance_loss: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(…, C) → (…, C)."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        probabilities = self.router(tokens)  # (N, E)
        weights, chosen = probabilities.topk(self.per_token, dim=-1)  # (N, k)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        used = torch.zeros_like(probabilities, dtype=torch.bool).scatter_(1, chosen, True)  # (N, E)
        mixed = self.mix(tokens, weights, chosen, used)
        for expert in self.shared_experts:
            mixed = mixed + expert(tokens)
        self.balance_loss = None
        if self.training and any(parameter.requires_grad for parameter in self.router.parameters()):
            self.balance_loss = load_balance(probabilities, used, self.per_token, self.counted)
        return mixed.view_as(hidden_states)

    def mix(self, tokens: Tensor, weights: Tensor, chosen: Tensor, used: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs, (N, C).

        The choices are sorted by expert, each expert runs on its tokens at once, and the results
        are put back in order. An expert without a token runs on none, so that its gradient is zero
        and not missing.
        """
        order = chosen.flatten().argsort(stable=True)  # (N · k,), grouped by expert
        pieces = tokens.index_select(0, order // self.per_token).split(self.loads(used))
        outputs = torch.cat([expert(piece) for expert, piece in zip(self.experts, pieces)])
        outputs = outputs.index_select(0, order.argsort()).unflatten(0, chosen.shape)  # (N, k, C)
        return (outputs * weights.to(outputs.dtype)[..., None]).sum(dim=1)

    def loads(self, used: Tensor) -> list[int]:
        """Tokens of each expert, for `used` (N, experts) truth values.

        They are read from the device once a layer: shapes that a compiler cannot know.
        """
        return used.sum(dim=0).tolist()


def count_tokens(
    model: nn.Module, attention_mask: Tensor | None, length: int, positions: Tensor | None
) -> None:
    """Tell each mixture of `model` which of the last `length` tokens its load-balance loss counts.

    These are all but padding, `attention_mask` (B, S) being above 0; the last mixture gets the
    chosen `positions` alone and counts all of them.
    """
    mixtures = _mixtures(model)
    for mixture in mixtures:
        mixture.counted = None if attention_mask is None else attention_mask[:, -length:] > 0
    if positions is not None:
        mixtures[-1].counted = None


def take_balance_loss(model: nn.Module) -> Tensor | None:
    """The load-balance losses of the last forward pass, summed over the mixtures of `model`.

    They are forgotten here, because each keeps the graph of its forward pass alive. None where
    there are none.
    """
    mixtures = _mixtures(model)
    losses = [mixture.balance_loss for mixture in mixtures if mixture.balance_loss is not None]
    for mixture in mixtures:
        mixture.balance_loss = None
    return torch.stack(losses).sum() if losses else None


def _mixtures(model: nn.Module) -> list[MixtureOfExperts]:
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


def load_balance(
    probabilities: Tensor, used: Tensor, per_token: int, counted: Tensor | None = None
) -> Tensor:
    """E · Σ f_i · P_i (Fedus et al. 2021, Switch Transformer), for k experts a token, not one.

    The result is 1 where all E experts are equally busy, and E / k where all tokens go to the same
    k. `probabilities` and `used`, with k true values a row, are (N, E); `counted` is any shape of N
    truth values (None: all true). f_i is the share of choices that fell on expert i, a count; the
    gradient goes through P_i, its mean probability.
    """
    tokens = used.new_ones(len(used)) if counted is None else counted.flatten()
    weights = (tokens / tokens.sum().clamp(min=1))[:, None]  # (N, 1)
    load = (used * weights).sum(dim=0) / per_token
    return len(load) * (load * (probabilities * weights).sum(dim=0)).sum()
