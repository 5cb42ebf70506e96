"""Resized grids against PyTorch's interpolation, numbers and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanovlm.model.layers import FILTERS, interpolation_weights, resize_grid

SIZES = [(16, 8, 8), (37, 16, 24), (5, 9, 2), (7, 7, 3), (4, 1, 1), (2, 5, 3), (1, 3, 2)]


def interpolated(grid: Tensor, rows: int, columns: int, mode: str) -> Tensor:
    """PyTorch's own, in the layout of `resize_grid`."""
    kind, _, antialias = mode.partition("_")
    grid = grid.permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (rows, columns), mode=kind, antialias=bool(antialias))
    return grid.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("side, rows, columns", SIZES)
@pytest.mark.parametrize("mode", FILTERS)
def test_a_resized_grid_and_its_gradient_equal_pytorchs(mode, side, rows, columns):
    torch.manual_seed(0)
    grid = torch.randn(2, side, side, 3, requires_grad=True)
    expected, ours = (make(grid, rows, columns, mode) for make in (interpolated, resize_grid))
    torch.testing.assert_close(ours, expected, atol=5e-6, rtol=0)
    arriving = torch.randn_like(ours)
    gradients = [torch.autograd.grad(result, grid, arriving)[0] for result in (ours, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", FILTERS)
def test_weights_add_up_to_one_and_of_the_same_size_change_nothing(mode):
    for size, new_size in ((5, 3), (3, 5), (1, 4), (9, 1)):
        weights = interpolation_weights(size, new_size, mode)
        assert weights.shape == (new_size, size)
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(new_size))
    assert torch.equal(interpolation_weights(6, 6, mode), torch.eye(6))


def test_under_autocast_a_grid_is_resized_in_fp32():
    grid = torch.randn(1, 9, 9, 4)
    with torch.autocast("cpu", torch.bfloat16):
        resized = resize_grid(grid, 4, 4, "bicubic")
        half = resize_grid(grid.bfloat16(), 4, 4, "bicubic")
    assert torch.equal(resized, resize_grid(grid, 4, 4, "bicubic"))
    assert torch.equal(half, resize_grid(grid.bfloat16().float(), 4, 4, "bicubic"))


class Operations(TorchDispatchMode):
    """Collects the names of all operations while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_the_gradient_of_a_resized_grid_takes_products_alone():
    """Interpolation's own backward kernels add with atomics on CUDA, and MPS lacks some."""
    operations = Operations()
    grid = torch.randn(1, 5, 5, 4, requires_grad=True)
    with operations:
        resize_grid(grid, 3, 3, "bicubic_antialias").sum().backward()
    assert operations.names and not [name for name in operations.names if "upsample" in name]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", FILTERS)
def test_a_gpu_resizes_as_the_cpu_does(mode):
    grid = torch.randn(2, 37, 37, 8)
    ours = resize_grid(grid.cuda(), 16, 24, mode).cpu()
    torch.testing.assert_close(ours, resize_grid(grid, 16, 24, mode), atol=1e-5, rtol=0)
