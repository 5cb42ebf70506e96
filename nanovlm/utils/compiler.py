"""torch.compile: whether it works here, and functions that go on uncompiled where it fails."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanovlm.errors import NanoVLMError
from nanovlm.utils.console import first_line, say

KINDS_OF_CALLS = 32  # most compilations of one function, such as with a mask and without


def compiler_problem(device: torch.device) -> str:
    """Why torch.compile does not work on `device`, and what helps; empty where it works."""
    try:
        torch.compile(_trial)(torch.ones(3, device=device))
    except Exception as error:  # of many kinds: no C++ compiler, no Triton, an unknown device
        problem = f"torch.compile does not work on {device} here ({first_line(error)})"
        return f"{problem}; install a C++ compiler, on CUDA also Triton"
    return ""


def _trial(values: Tensor) -> Tensor:
    return values.sin() + 1


def require_compiler(device: torch.device) -> None:
    """Raise an error of one line where `--compile` cannot be done."""
    if problem := compiler_problem(device):
        raise NanoVLMError(f"--compile: {problem}, or leave --compile out")


class Compiler:
    """Compiles functions of one program part, `name`, which all run as written once one fails.

    A failure of the compiler, and more than KINDS_OF_CALLS kinds of calls, are said once and stop
    nothing. `options` go to torch.compile.
    """

    def __init__(self, name: str, **options: Any) -> None:
        self.name, self.failed = name, False
        self.options = {"recompile_limit": KINDS_OF_CALLS, **options}
        # By default a function with too many kinds of calls runs uncompiled from then on. With this
        # it raises an error, which is reported.
        torch._dynamo.config.fail_on_recompile_limit_hit = True

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, compiled at its first call."""
        return _Compiled(self, function)


class _Compiled:
    def __init__(self, compiler: Compiler, function: Callable[..., Any]) -> None:
        self.compiler, self.function = compiler, function
        self.compiled = torch.compile(function, **compiler.options)

    def __call__(self, *arguments: Any) -> Any:
        if not self.compiler.failed:
            try:
                return self.compiled(*arguments)
            except Exception as error:
                reason = _failure(error)
                if not reason:
                    raise
                self.compiler.failed = True
                say(f"{self.compiler.name}: not compiled from here on ({reason})")
        return self.function(*arguments)


def _failure(error: Exception) -> str:
    """What made the compiler give up, in a line; empty for an error that is not the compiler's."""
    # Imported here, since it takes a second.
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    if isinstance(error, FailOnRecompileLimitHit):
        return f"there are more than {KINDS_OF_CALLS} kinds of calls"
    if not isinstance(error, TorchDynamoException):
        return ""
    cause = getattr(error, "inner_exception", error)  # the backend's own, where it failed
    return first_line(cause)


def compiled_on_cuda(
    function: Callable[..., Any], device: torch.device, name: str
) -> Callable[..., Any] | None:
    """`function`, compiled for all sizes of `dynamic` dimensions; None where it runs as written.

    That is on other devices, and where the compiler does not work or has failed. `name` is what the
    log calls it.
    """
    if not _compiles_on(device.type):
        return None
    compiled = _compiled(function, name)
    return None if compiled.compiler.failed else compiled


def dynamic(tensor: Tensor, *dimensions: int) -> Tensor:
    """An alias of `tensor`, of which these dimensions may change without another compilation."""
    alias = tensor.data  # and not a view, whose base's shape would be compiled in
    torch._dynamo.maybe_mark_dynamic(alias, dimensions)
    return alias


@functools.cache
def _compiles_on(device: str) -> bool:
    if device != "cuda":
        return False
    switched_off = "TORCH_COMPILE_DISABLE is set" if torch._dynamo.config.disable else ""
    if problem := switched_off or compiler_problem(torch.device(device)):
        say(f"8-bit moments, stochastic rounding and quantized weights run uncompiled: {problem}")
    return not problem


@functools.cache
def _compiled(function: Callable[..., Any], name: str) -> _Compiled:
    return _Compiled(Compiler(name, dynamic=False), function)
