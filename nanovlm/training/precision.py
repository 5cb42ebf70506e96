"""The compute dtype of a run: autocast, and loss scaling for fp16.

Lesson: lessons/source/15_mixed_precision.py.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanovlm.errors import NanoVLMError, quoted
from nanovlm.training.distributed.shares import local
from nanovlm.utils.config import from_dict
from nanovlm.utils.device import autocast


@dataclass
class LossScaler:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018).

    The loss is multiplied by a factor so that small gradients do not vanish, and the gradients are
    divided by it again. A step that overflows is dropped and the factor halved.
    """

    scale: float = 2.0**16
    growth_interval: int = 1000  # steps without overflow after which the factor doubles
    good_steps: int = 0

    def restore(self, saved: dict, where: str) -> None:
        """Go on from what `vars` gave before; `where` begins the message of a NanoVLMError."""
        before = from_dict(LossScaler, saved, where)
        if not 0 < before.scale < math.inf or before.growth_interval < 1 or before.good_steps < 0:
            raise NanoVLMError(f"{where} is {quoted(saved)}; its numbers have to be above 0")
        vars(self).update(vars(before))

    def unscale(self, parameters: list[nn.Parameter], largest: Callable[[int], int] = int) -> bool:
        """Divide the gradients by the factor; True if all are finite, so the step may be taken.

        Reads one number back from the device, so fp16 waits for it in every step. `largest` takes
        the maximum over processes.
        """
        present = [parameter.grad for parameter in parameters if parameter.grad is not None]
        gradients = [local(gradient) for gradient in present]
        if not gradients:  # such as those of a projector in a step without images
            return True
        torch._foreach_mul_(gradients, 1 / self.scale)  # pyright: ignore[reportPrivateImportUsage]
        all_finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
        finite = not largest(int(not all_finite))
        if finite:
            self.good_steps += 1
            if self.good_steps % self.growth_interval == 0:
                self.scale *= 2
        else:
            self.scale, self.good_steps = max(self.scale / 2, 1.0), 0
        return finite


class Precision:
    """The compute dtype and the device of a run.

    Trainable parameters stay in fp32 and are cast for each product (autocast); frozen ones are cast
    once. With `stochastic_rounding` trainable ones are kept in bf16, too, and the optimizer rounds
    them up or down at random (`adamw.py`).
    """

    def __init__(
        self, dtype: torch.dtype, device: torch.device, stochastic_rounding: bool = False
    ) -> None:
        if stochastic_rounding and dtype != torch.bfloat16:
            raise NanoVLMError(
                "--stochastic-rounding keeps trainable parameters in bf16 and this run computes in "
                f"{str(dtype).removeprefix('torch.')}; take --dtype bfloat16 where there is one, "
                "or leave it out"
            )
        self.dtype, self.device = dtype, device
        self.trainable_dtype = torch.bfloat16 if stochastic_rounding else torch.float32
        self.scaler = LossScaler() if dtype == torch.float16 else None

    def place(self, model: nn.Module) -> None:
        """Give parameters their dtype and device, and buffers (quantised matrices) their device."""
        for parameter in model.parameters():
            dtype = self.trainable_dtype if parameter.requires_grad else self.dtype
            parameter.data = parameter.data.to(self.device, dtype)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))

    def autocast(self, device: torch.device | None = None) -> contextlib.AbstractContextManager:
        """The context of a forward pass; `device` if the model is on another one than the run."""
        return autocast(device or self.device, self.dtype)

    @property
    def may_overflow(self) -> bool:
        """Whether a gradient that is not finite may come from the factor of the loss scaler."""
        return self.scaler is not None and self.scaler.scale > 1

    def unscale(self, parameters: list[nn.Parameter], largest: Callable[[int], int] = int) -> bool:
        """Undo `scaled` on the gradients; False if they overflowed: the step has to be dropped."""
        return self.scaler is None or self.scaler.unscale(parameters, largest)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to call `backward` on."""
        return loss if self.scaler is None else loss * self.scaler.scale
