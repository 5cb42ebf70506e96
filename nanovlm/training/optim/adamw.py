"""AdamW in less memory: moments in 8 bits, weights in bf16 without an fp32 copy, or both.

Lessons: lessons/source/14_training_loop.py, lessons/source/15_mixed_precision.py.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanovlm.training.optim.eight_bit import BLOCK, Tables, dequantize, quantize, tables
from nanovlm.utils.compiler import compiled_on_cuda, dynamic

SLICE = 2**20  # elements that are updated at once, uncompiled; a multiple of BLOCK
MOMENTS = ("exp_avg", "exp_avg_sq")
SMALLEST = 4096  # elements of a parameter whose moments are kept in 8 bits; not norms and biases


class LeanAdamW(torch.optim.Optimizer):
    """AdamW in fp32: on CUDA compiled, a parameter at once, elsewhere a slice of it at a time.

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
            parameters = [each for each in group["params"] if each.grad is not None]
            if not parameters:
                continue
            states = [self.state[each] or self._start(each) for each in parameters]
            device, taken = states[0]["step"].device, torch.ones_like(states[0]["step"])
            if self.found_inf is not None:
                taken = 1 - self.found_inf.to(device)
            for state in states:
                state["step"] += taken
            lr = taken * group["lr"]
            decay = lr * group["weight_decay"]
            coding = {}
            if self.eight_bit:
                coding = {kind: tables(kind == "exp_avg", device) for kind in MOMENTS}
            constants = Constants(group["betas"], group["eps"], self.stochastic_rounding, coding)
            for parameter, state in zip(parameters, states):
                _update(parameter, state, Rates(state["step"], taken, lr, decay), constants)

    def _start(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The state before the first step: zeros."""
        state = self.state[parameter]
        for kind, (dtype, shape) in moment_forms(parameter, self.eight_bit).items():
            state[kind] = torch.zeros(shape, dtype=dtype, device=parameter.device)
        return state


class Rates(NamedTuple):
    """What changes from step to step: numbers on the device, so that no step waits for them."""

    step: Tensor  # that were taken, with this one
    taken: Tensor  # 1, or 0 where this step changes nothing
    lr: Tensor  # 0 where it changes nothing, as is the decay
    decay: Tensor  # learning rate times weight decay


class Constants(NamedTuple):
    """What stays the same in a run."""

    betas: tuple[float, float]
    eps: float
    stochastic_rounding: bool
    tables: dict[str, Tables]  # of moments that are kept as codes, by the moment's name


def adamw_(tensors: dict[str, Tensor], rates: Rates, constants: Constants) -> None:
    """A step of AdamW (Loshchilov & Hutter 2019) on some elements, in place, computed in fp32.

    `tensors` are their weights, gradient and moments, all (n,), or where moments are codes
    (blocks, n) with scales (blocks,). Compiled, it is one kernel: each is read and written once.
    """
    weights, gradient = tensors["weights"], tensors["gradient"]
    (beta1, beta2), tables = constants.betas, constants.tables
    taken, step = rates.taken, rates.step.clamp(min=1)
    step_size, spread = rates.lr / _correction(beta1, step), _correction(beta2, step).sqrt()
    gradient = torch.where(taken > 0, gradient.float(), 0.0)
    # Of tensors in fp32 these are the tensors themselves, updated in place.
    average, square = (_read(tensors, kind, tables) for kind in MOMENTS)
    new_weights = weights.float()
    average.lerp_(gradient, taken * (1 - beta1))
    square.mul_(1 - taken * (1 - beta2)).addcmul_(gradient, gradient, value=1 - beta2)
    update = average / (square.sqrt() / spread).add_(constants.eps)
    new_weights.mul_(1 - rates.decay).sub_(update.mul_(step_size))
    _write(tensors, "exp_avg", average, taken, tables)
    _write(tensors, "exp_avg_sq", square, taken, tables)
    if weights.dtype != torch.float32:
        rounds = constants.stochastic_rounding
        weights.copy_(stochastic_round(new_weights) if rounds else new_weights)


def _read(tensors: dict[str, Tensor], moment: str, tables: dict[str, Tables]) -> Tensor:
    """A moment in fp32: the tensor itself, or its decoded codes."""
    stored = tensors[moment]
    if stored.dtype == torch.float32:
        return stored
    return dequantize(stored, tensors[f"{moment}_scale"], tables[moment])


def _write(
    tensors: dict[str, Tensor],
    moment: str,
    values: Tensor,
    taken: Tensor,
    tables: dict[str, Tables],
) -> None:
    """Encode a moment if the step is taken; one in fp32 has been changed in place."""
    if tensors[moment].dtype != torch.float32:
        kept = tensors[moment], tensors[f"{moment}_scale"]
        for old, new in zip(kept, quantize(values, tables[moment])):
            old.copy_(torch.where(taken > 0, new, old))


def _update(
    parameter: nn.Parameter, state: dict[str, Tensor], rates: Rates, constants: Constants
) -> None:
    """A step of one parameter: compiled, all whole blocks at once, or slice by slice."""
    assert parameter.grad is not None
    tensors = {"weights": parameter.detach(), "gradient": parameter.grad, **state}
    block = BLOCK if "exp_avg_scale" in state else 1
    count = parameter.numel()
    compiled = compiled_on_cuda(adamw_, parameter.device, "the optimizer's step")
    for part in _parts(count, count if compiled else SLICE, block):
        cut = _cut(tensors, part, block)
        if compiled and (part.stop - part.start) % block == 0:
            compiled({name: dynamic(cut[name], 0) for name in cut}, rates, constants)
        else:
            adamw_(cut, rates, constants)


def _parts(count: int, most: int, block: int) -> Iterator[slice]:
    """Whole blocks of `count` elements, at most `most` elements at a time, and then the rest."""
    whole = count - count % block
    for start in range(0, whole, max(most, 1)):
        yield slice(start, min(start + most, whole))
    if whole < count:
        yield slice(whole, count)


def _cut(tensors: dict[str, Tensor], part: slice, block: int) -> dict[str, Tensor]:
    """Views of some elements, in blocks unless a block is one element."""
    shape = (-1,) if block == 1 else (-1, min(block, part.stop - part.start))
    blocks = slice(part.start // block, -(-part.stop // block))
    return {
        name: tensor[blocks] if name.endswith("_scale") else tensor.reshape(-1)[part].view(shape)
        for name, tensor in tensors.items()
        if name != "step"
    }


def stochastic_round(values: Tensor) -> Tensor:
    """fp32 → bf16, rounded up or down at random so that the mean is exact (Gupta et al. 2015).

    bf16 is the upper half of fp32's bits. A random lower half is added, which carries the more
    often the nearer the value is to the next one up, and the lower half is cut off. Infinities and
    NaNs stay what they are.
    """
    noise = torch.randint(2**16, values.shape, dtype=torch.int32, device=values.device)
    bits = noise.add_(values.view(torch.int32))
    rounded = bits.bitwise_and_(-(2**16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def moment_forms(
    parameter: Tensor, eight_bit: bool
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The dtype and shape of all that AdamW, PyTorch's as well, keeps for `parameter`.

    A count of its steps and two moments in its shape, with scales where they are kept as codes.
    """
    coded = eight_bit and parameter.numel() >= SMALLEST
    forms: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"step": (torch.float32, ())}
    for kind in MOMENTS:
        forms[kind] = (torch.uint8 if coded else torch.float32, tuple(parameter.shape))
        if coded:
            forms[f"{kind}_scale"] = (torch.float32, (-(-parameter.numel() // BLOCK),))
    return forms


def moment_bytes(parameter: Tensor, eight_bit: bool) -> int:
    """Bytes of the two moments that `LeanAdamW` keeps for `parameter`."""
    count = parameter.numel()
    return 2 * (count + 4 * -(-count // BLOCK)) if eight_bit and count >= SMALLEST else 8 * count


def _correction(beta: float, step: Tensor) -> Tensor:
    """1 − beta^step, accurate also where beta^step is close to 1."""
    return -torch.expm1(step * (math.log(beta) if beta else -math.inf))
