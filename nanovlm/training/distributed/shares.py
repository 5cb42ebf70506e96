"""Tensors of which each process holds a share (`DTensor`, with fsdp), beside ordinary ones, which pass unchanged."""

import torch
import torch.distributed as dist
from torch import Tensor

from nanovlm.utils.processes import is_main, processes


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor; of one that is not shared, all of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def gather(tensor: Tensor) -> Tensor | None:
    """The whole of a tensor: one that is not shared itself; a shared one on the CPU of rank 0, None in the others. All
    processes have to call it."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    full = tensor.detach().full_tensor()
    return full.cpu() if is_main() else None


def scatter(full: Tensor, like: Tensor) -> Tensor:
    """A copy of `full` as `like` is kept: on its device and, where that one is shared, only this process's share."""
    if full.shape == like.shape and hasattr(like, "full_tensor"):
        from torch.distributed.tensor import (
            distribute_tensor,
        )  # imported where it is needed: it takes a moment

        return distribute_tensor(
            full.to(like.device), like.device_mesh, like.placements, src_data_rank=None
        )
    return full.clone().to(like.device)


def total(*numbers: float) -> list:
    """Each number summed over the processes, from CPU to CPU; whole numbers stay whole."""
    if processes()[1] == 1:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums)
    return [type(number)(value) for number, value in zip(numbers, sums.tolist())]


def wait() -> None:
    """Go on when all processes have come here."""
    total(0)
