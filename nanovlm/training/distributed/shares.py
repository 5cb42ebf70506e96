"""Tensors of which each process holds a share (`DTensor`, with fsdp), and numbers of all processes.

Ordinary tensors pass through these functions unchanged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from nanovlm.utils.processes import is_main, processes

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_shared(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether each process holds only a share; tells without importing DTensor, which is slow."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor; all of one that is not shared."""
    return tensor.to_local() if is_shared(tensor) else tensor


def gather(tensor: Tensor) -> Tensor | None:
    """The whole of a tensor: a shared one on the CPU of rank 0, and None in the other processes.

    All processes have to call it.
    """
    if is_shared(tensor):
        full = tensor.full_tensor().detach()
        return full.cpu() if is_main() else None
    return tensor


def scatter(full: Tensor, like: Tensor) -> Tensor:
    """A copy of `full` on the device of `like`; only this process's share if `like` is shared."""
    if full.shape == like.shape and is_shared(like):
        from torch.distributed.tensor import distribute_tensor  # here, since it takes a moment

        return distribute_tensor(
            full.to(like.device), like.device_mesh, like.placements, src_data_rank=None
        )
    return full.clone().to(like.device)


def total(*numbers: float) -> list:
    """Each number summed over the processes, on the CPU; whole numbers stay whole."""
    if processes()[1] == 1:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums)
    return [type(number)(value) for number, value in zip(numbers, sums.tolist())]


def wait() -> None:
    """Wait until all processes have called this."""
    total(0)
