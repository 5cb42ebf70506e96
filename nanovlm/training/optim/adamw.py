"""AdamW in less memory: moments in 8 bits, weights in bf16 without an fp32 copy, or both."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nanovlm.training.optim.eight_bit import BLOCK, dequantize, quantize

SLICE = 2**20  # elements that are updated at once, in fp32; a multiple of BLOCK
SMALLEST = 4096  # elements of a parameter whose moments are kept in 8 bits; not norms and biases


class LeanAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019), computed in fp32, a slice of a parameter at a time.

    With `eight_bit` the moments of large parameters are kept as 8-bit codes (`eight_bit.py`). With
    `stochastic_rounding` bf16 parameters are rounded up or down at random, so that on average no
    update is lost. The state consists of tensors on the parameter's device, and no step waits for
    it. Where `found_inf` is 1, a step changes nothing, as in PyTorch's fused AdamW.
    """

    def __init__(  # noqa: PLR0913 (PyTorch's own arguments, and two)
        self,
        parameters: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        eight_bit: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(parameters, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.eight_bit, self.stochastic_rounding = eight_bit, stochastic_rounding
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    options = {name: group[name] for name in self.defaults}
                    self._update(parameter, parameter.grad, **options)

    def _update(
        self,
        parameter: nn.Parameter,
        gradients: Tensor,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        state = self.state[parameter] or self._start(parameter)
        taken = torch.ones_like(state["step"])  # 1, or 0 where the step changes nothing
        if self.found_inf is not None:
            taken = 1 - self.found_inf.to(parameter.device)
        state["step"] += taken
        corrections = [_correction(beta, state["step"].clamp(min=1)) for beta in betas]
        step_size, spread = taken * lr / corrections[0], corrections[1].sqrt()
        all_weights, all_gradients = parameter.view(-1), gradients.reshape(-1)
        for start in range(0, parameter.numel(), SLICE):
            part = slice(start, min(start + SLICE, parameter.numel()))
            # Of fp32 tensors these are the slices themselves, updated in place.
            weights, gradient = all_weights[part].float(), all_gradients[part].float()
            gradient = torch.where(taken > 0, gradient, 0.0)
            average, square = _read(state, "exp_avg", part), _read(state, "exp_avg_sq", part)
            average.lerp_(gradient, taken * (1 - betas[0]))
            square.mul_(1 - taken * (1 - betas[1])).addcmul_(gradient, gradient, value=1 - betas[1])
            update = average / (square.sqrt() / spread).add_(eps)
            weights.mul_(1 - taken * lr * weight_decay).sub_(update.mul_(step_size))
            _write(state, "exp_avg", part, average, taken)
            _write(state, "exp_avg_sq", part, square, taken)
            if parameter.dtype != torch.float32:
                rounds = self.stochastic_rounding
                all_weights[part] = stochastic_round(weights) if rounds else weights

    def _start(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Moments of zero in the parameter's shape, with scales where they are kept as codes."""
        state, device = self.state[parameter], parameter.device
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        coded = self.eight_bit and parameter.numel() >= SMALLEST
        for kind in ("exp_avg", "exp_avg_sq"):
            state[kind] = torch.zeros_like(parameter, dtype=torch.uint8 if coded else torch.float32)
            if coded:
                state[f"{kind}_scale"] = torch.zeros(
                    -(-parameter.numel() // BLOCK), dtype=torch.float32, device=device
                )
        return state


def stochastic_round(values: Tensor) -> Tensor:
    """fp32 → bf16, rounded up or down at random so that the mean is exact (Gupta et al. 2015).

    bf16 is the upper half of fp32's bits. A random lower half is added, which carries the more
    often the nearer the value is to the next one up, and the lower half is cut off. Infinities and
    NaNs stay what they are.
    """
    noise = torch.empty_like(values, dtype=torch.int32).random_(0, 2**16)
    bits = noise.add_(values.view(torch.int32))
    rounded = bits.bitwise_and_(-(2**16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def moment_bytes(parameter: Tensor, eight_bit: bool) -> int:
    """Bytes of the two moments that `LeanAdamW` keeps for `parameter`."""
    count = parameter.numel()
    return 2 * (count + 4 * -(-count // BLOCK)) if eight_bit and count >= SMALLEST else 8 * count


def _correction(beta: float, step: Tensor) -> Tensor:
    """1 − beta^step, accurate also where beta^step is close to 1."""
    return -torch.expm1(step * (math.log(beta) if beta else -math.inf))


def _read(state: dict[str, Tensor], kind: str, part: slice) -> Tensor:
    """A slice of a moment in fp32: a view of the moment, or its decoded codes."""
    stored = state[kind].view(-1)[part]
    if stored.dtype == torch.float32:
        return stored
    return dequantize(stored, state[f"{kind}_scale"][_blocks(part)], signed=kind == "exp_avg")


def _write(state: dict[str, Tensor], kind: str, part: slice, values: Tensor, taken: Tensor) -> None:
    """Encode a slice if the step is taken; a view of the moment has been changed in place."""
    stored = state[kind].view(-1)[part]
    if stored.dtype != torch.float32:
        scales = state[f"{kind}_scale"][_blocks(part)]
        for kept, new in zip((stored, scales), quantize(values, signed=kind == "exp_avg")):
            kept.copy_(torch.where(taken > 0, new, kept))


def _blocks(part: slice) -> slice:
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))
