"""Whether torch.compile works, said once where it does not, and functions compiled for any size."""

import pytest
import torch
from torch import Tensor

from nanovlm.utils.compiler import compiled, compiler_fault, compiles_on, dynamic
from tests.compiling import count_graphs, forget_compiled  # noqa: F401


@pytest.fixture(autouse=True)
def try_again():
    for function in (compiler_fault, compiles_on):
        function.cache_clear()
    yield
    for function in (compiler_fault, compiles_on):
        function.cache_clear()


def test_nothing_is_compiled_on_a_cpu_and_no_compiler_is_looked_for(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda *arguments, **options: pytest.fail("compiled"))
    assert not compiles_on("cpu") and not compiles_on("mps")
    assert capsys.readouterr().err == ""


def test_a_compiler_that_does_not_work_is_said_once(monkeypatch, capsys):
    def broken(function, **options):
        raise RuntimeError("Cannot find a working triton installation\nand a page of advice")

    monkeypatch.setattr(torch, "compile", broken)
    assert not compiles_on("cuda") and not compiles_on("cuda")
    said = capsys.readouterr().err
    assert said.count("Cannot find a working triton installation") == 1
    assert len(said.splitlines()) == 1


def test_a_compiler_that_is_switched_off_is_not_used(capsys):
    with torch._dynamo.config.patch(disable=True):
        assert not compiles_on("cuda")
    assert "TORCH_COMPILE_DISABLE" in capsys.readouterr().err


def test_one_compilation_serves_every_size_of_a_dynamic_dimension(monkeypatch):
    graphs = count_graphs(monkeypatch)

    def double(values: Tensor) -> Tensor:
        return values * 2

    for rows in (3, 8, 5, 8, 100):
        whole = torch.randn(rows * 4 + 1)
        part = whole[: rows * 4].view(rows, 4)  # the size of what it is a view of does not matter
        assert torch.equal(compiled(double)(dynamic(part, 0)), part * 2)
    assert graphs.captured == 1


def test_what_is_changed_in_place_is_the_tensor_itself(monkeypatch):
    count_graphs(monkeypatch)

    def double_(values: Tensor) -> None:
        values.mul_(2)

    values = torch.ones(3, 4)
    compiled(double_)(dynamic(values.view(-1), 0))
    assert values.eq(2).all()
