"""In which number format a run computes, and how gradients survive half precision."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanovlm.errors import NanoVLMError
from nanovlm.training.distributed.shares import local


@dataclass
class LossScaler:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018): the loss is multiplied so that small gradients do not
    vanish, the gradients divided again; a step that overflows is dropped and the factor halved."""

    scale: float = 2.0**16
    growth_interval: int = 1000  # steps without overflow after which the factor doubles
    good_steps: int = 0

    def unscale(self, parameters: list[nn.Parameter], largest: Callable[[int], int] = int) -> bool:
        """Divide the gradients by the factor; True if all are finite, so that the step may be taken. Reads one number
        back from the device, which fp16 alone has to pay for. `largest` is over the processes that share them."""
        gradients = [
            local(parameter.grad) for parameter in parameters if parameter.grad is not None
        ]
        if not gradients:  # a step without images gives the projector none
            return True
        torch._foreach_mul_(gradients, 1 / self.scale)
        finite = not largest(
            not torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
        )
        if finite:
            self.good_steps += 1
            if self.good_steps % self.growth_interval == 0:
                self.scale *= 2
        else:
            self.scale, self.good_steps = max(self.scale / 2, 1.0), 0
        return finite


class Precision:
    """How a run computes: parameters that learn stay in fp32 and are cast for each product, frozen ones are kept cast.

    With `stochastic_rounding` those that learn are kept in bf16 too; the optimizer rounds at random (`adamw.py`).
    """

    def __init__(
        self, dtype: torch.dtype, device: torch.device, stochastic_rounding: bool = False
    ) -> None:
        if stochastic_rounding and dtype != torch.bfloat16:
            raise NanoVLMError(
                "--stochastic-rounding keeps what learns in bf16 and this run computes in "
                f"{str(dtype).removeprefix('torch.')}; take --dtype bfloat16 where there is one, or leave it out"
            )
        self.dtype, self.device = dtype, device
        self.learned_dtype = torch.bfloat16 if stochastic_rounding else torch.float32
        self.scaler = LossScaler() if dtype == torch.float16 else None

    def place(self, model: nn.Module) -> None:
        """Give every parameter its number format and device; buffers, which hold quantised matrices, the device alone."""
        for parameter in model.parameters():
            dtype = self.learned_dtype if parameter.requires_grad else self.dtype
            parameter.data = parameter.data.to(self.device, dtype)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))

    def autocast(self, device: torch.device | None = None) -> contextlib.AbstractContextManager:
        """The context of a forward pass, of a model on another device than the run's if one is given.

        Without autocast's cache: each weight is used once, and the cache would hold on to its cast copy to the end of the
        pass, also where checkpointing has let go of it.
        """
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast((device or self.device).type, dtype=self.dtype, cache_enabled=False)

    @property
    def may_overflow(self) -> bool:
        """Whether a gradient that is not finite is only the loss scaler looking for its factor."""
        return self.scaler is not None and self.scaler.scale > 1

    def unscale(self, parameters: list[nn.Parameter], largest: Callable[[int], int] = int) -> bool:
        """Undo `scaled` on the gradients; False if they overflowed, so that the step has to be dropped."""
        return self.scaler is None or self.scaler.unscale(parameters, largest)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to call `backward` on."""
        return loss if self.scaler is None else loss * self.scaler.scale
