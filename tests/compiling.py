"""What torch.compile makes of a function, counted without compiling it."""

import shutil

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from nanovlm.utils import compiler

needs_cpp = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler here"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


class Graphs:
    """A backend of torch.compile that runs graphs as they were captured, operation by operation.

    captured: graphs. bytes: what the calls since the last reset read and wrote if each graph were
    one kernel, its inputs and outputs.
    """

    def __init__(self) -> None:
        self.captured = self.bytes = 0
        self.backend = aot_autograd(fw_compiler=self._compile)

    def _compile(self, graph, example_inputs):
        self.captured += 1

        def run(*inputs):
            outputs = graph(*inputs)
            tensors = [each for each in (*inputs, *outputs) if isinstance(each, Tensor)]
            self.bytes += sum(tensor.nbytes for tensor in tensors)
            return outputs

        return make_boxed_func(run)


def everywhere(monkeypatch) -> None:
    """Compile on a CPU, too, what is compiled on CUDA, and each function anew."""
    torch._dynamo.reset()
    compiler._compiled.cache_clear()
    monkeypatch.setattr(compiler, "_compiles_on", lambda device: True)


def count_graphs(monkeypatch) -> Graphs:
    """The same by `Graphs` in place of the compiler."""
    graphs, compile = Graphs(), torch.compile
    everywhere(monkeypatch)

    def captured(function, **options):
        return compile(function, backend=graphs.backend, **options)

    monkeypatch.setattr(torch, "compile", captured)
    return graphs


@pytest.fixture(autouse=True)
def forget_compiled():
    """What a test compiled is not for the next one."""
    yield
    compiler._compiled.cache_clear()
