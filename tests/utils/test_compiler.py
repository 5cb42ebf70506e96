"""Functions compiled on CUDA for any size, and how they go on where the compiler does not work."""

import pytest
import torch
from torch import Tensor

from nanovlm.utils import compiler
from nanovlm.utils.compiler import compiled_on_cuda, dynamic
from tests.compiling import count_graphs, forget_compiled  # noqa: F401

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def try_again():
    compiler._compiles_on.cache_clear()
    yield
    compiler._compiles_on.cache_clear()


def double(values: Tensor) -> Tensor:
    return values * 2


def double_(values: Tensor) -> None:
    values.mul_(2)


def test_elsewhere_nothing_is_compiled_and_no_compiler_is_looked_for(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda *arguments, **options: pytest.fail("compiled"))
    assert all(compiled_on_cuda(double, torch.device(name), "x") is None for name in ("cpu", "mps"))
    assert capsys.readouterr().err == ""


def test_a_compiler_that_does_not_work_is_said_once(monkeypatch, capsys):
    def broken(function, **options):
        raise RuntimeError("Cannot find a working triton installation\nand a page of advice")

    monkeypatch.setattr(torch, "compile", broken)
    assert compiled_on_cuda(double, CUDA, "x") is compiled_on_cuda(double_, CUDA, "y") is None
    said = capsys.readouterr().err
    assert said.count("Cannot find a working triton installation") == len(said.splitlines()) == 1


def test_a_compiler_that_is_switched_off_is_not_used(capsys):
    with torch._dynamo.config.patch(disable=True):
        assert compiled_on_cuda(double, CUDA, "x") is None
    assert "TORCH_COMPILE_DISABLE" in capsys.readouterr().err


def test_a_function_that_cannot_be_compiled_runs_as_written_and_is_not_tried_again(
    monkeypatch, capsys
):
    graphs = count_graphs(monkeypatch)

    def broken(graph, example_inputs):
        raise RuntimeError("no kernel for this")

    graphs.backend = broken
    run = compiled_on_cuda(double, CUDA, "the test")
    assert run is not None and run(torch.ones(3)).eq(2).all()
    assert compiled_on_cuda(double, CUDA, "the test") is None
    said = capsys.readouterr().err
    assert said.startswith("the test: not compiled from here on (no kernel for this)")


def test_one_compilation_serves_every_size_of_a_dynamic_dimension(monkeypatch):
    graphs = count_graphs(monkeypatch)
    run = compiled_on_cuda(double, CPU, "x")
    for rows in (3, 8, 5, 8, 100):
        whole = torch.randn(rows * 4 + 1)
        part = whole[: rows * 4].view(rows, 4)  # the size of what it is a view of does not matter
        assert torch.equal(run(dynamic(part, 0)), part * 2)
    assert graphs.captured == 1


def test_what_is_changed_in_place_is_the_tensor_itself(monkeypatch):
    count_graphs(monkeypatch)
    values = torch.ones(3, 4)
    compiled_on_cuda(double_, CPU, "x")(dynamic(values.view(-1), 0))
    assert values.eq(2).all()
