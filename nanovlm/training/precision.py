"""In which number format a run computes, and how gradients survive half precision."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanovlm.training.parallel import local


@dataclass
class LossScaler:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018): the loss is multiplied so that small gradients do not
    vanish, the gradients divided again; a step that overflows is dropped and the factor halved."""

    scale: float = 2.0 ** 16
    growth_interval: int = 1000  # steps without overflow after which the factor doubles
    good_steps: int = 0

    def unscale(self, parameters: list[nn.Parameter], any_process: Callable[[bool], bool] = bool) -> bool:
        """Divide the gradients by the factor; True if all are finite, so that the step may be taken. Of several processes
        with a share each, `any_process` says whether something is true in any (`Parallel.any`). Reads one number back from the device, which fp16 alone has to pay for."""
        gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        if not gradients:  # a step without images gives the projector none
            return True
        torch._foreach_mul_(gradients, 1 / self.scale)
        finite = not any_process(not torch.stack([gradient.isfinite().all() for gradient in gradients]).all())
        if finite:
            self.good_steps += 1
            if self.good_steps % self.growth_interval == 0:
                self.scale *= 2
        else:
            self.scale, self.good_steps = max(self.scale / 2, 1.0), 0
        return finite


class Precision:
    """How a run computes: parameters that learn stay in fp32 and are cast for each product, frozen ones are kept cast."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.scaler = LossScaler() if dtype == torch.float16 else None

    def place(self, model: nn.Module) -> None:
        """Give every parameter its number format and device."""
        for parameter in model.parameters():
            dtype = torch.float32 if parameter.requires_grad else self.dtype
            parameter.data = parameter.data.to(self.device, dtype)

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context of a forward pass."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to call `backward` on."""
        return loss if self.scaler is None else loss * self.scaler.scale
