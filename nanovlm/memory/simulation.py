"""Tensors without contents, as if they were on a GPU, whether this machine has one or not.

Tensors on the meta device have shapes and dtypes, and every operation on them, forward and
backward, says what it would give, in no time and memory. `Simulated` makes the code that runs with
them, the package's own and PyTorch's, behave as on the device it names: that is what their
`device` says, autocast casts by the rules of that device, and attention takes the kernel that the
device would take.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves

from nanovlm.model import quantization
from nanovlm.model.moe import MixtureOfExperts
from nanovlm.training.optim import eight_bit
from nanovlm.utils import compiler

META = torch.device("meta")
# Of the operations that the package uses those that autocast casts, by device
# (torch/include/ATen/autocast_mode.h): to the compute dtype everywhere; to fp32 and to the widest
# dtype among the inputs.
COMPUTE_DTYPE = {
    *("linear", "conv2d", "matmul", "mm", "bmm", "addmm", "baddbmm"),
    *("__matmul__", "scaled_dot_product_attention"),
}
NORMS_AND_SUMS = {
    *("layer_norm", "rms_norm", "softmax", "log_softmax", "logsumexp", "sum", "prod", "cumsum"),
    *("exp", "expm1", "log", "log1p", "pow", "__pow__", "square", "rsqrt", "reciprocal", "norm"),
    *("nll_loss", "binary_cross_entropy_with_logits", "softplus", "vector_norm"),
}
FP32 = {"cuda": NORMS_AND_SUMS | {"interpolate"}, "cpu": {"interpolate", "prod"}}
WIDEST = {
    "cuda": {"addcmul", "addcdiv", "index_put", "scatter_add", "dot"},
    "cpu": {"cat", "stack", "index_copy"},
}
CONSTRUCTORS = _device_constructors()  # torch.empty and its kin
HALF = (torch.float16, torch.bfloat16)


def attention_kernel(
    queries: Tensor, keys: Tensor, mask: Tensor | None, grouped: bool, device: str
) -> str:
    """The kernel that `scaled_dot_product_attention` takes: flash, efficient or math.

    On CUDA the first in PyTorch's order that can (`sdp_utils.cpp`, `Context.h`): flash takes half
    precision and no mask, efficient takes no keys that several heads share.
    """
    if device == "cpu":
        return "flash"
    if mask is None and queries.dtype in HALF and queries.shape[-1] <= 256:
        return "flash"
    return "math" if grouped and queries.shape[1] != keys.shape[1] else "efficient"


@contextlib.contextmanager
def simulated(
    device: torch.device, compiled: Callable[[], AbstractContextManager] = contextlib.nullcontext
) -> Iterator["Simulated"]:
    """While it is entered, tensors are made on the meta device and behave as if on `device`.

    What is compiled there runs as it is written, within the context `compiled`.
    """

    def compile_function(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with compiled():
                return function(*arguments)

        run.compiler = SimpleNamespace(failed=False)  # pyright: ignore[reportFunctionMemberAccess]
        return run

    # PyTorch asks for hardware where it needs none, or asks below Python, where the device is seen
    # to be meta.
    answers = {
        "torch.cuda.amp.common.amp_definitely_not_available": False,
        "torch.cuda.is_bf16_supported": True,
        "torch.nn.utils.clip_grad._has_foreach_support": True,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch(name, lambda *_, answer=answer: answer))
        # The optimizer's step and the decoding of quantised weights are compiled.
        stack.enter_context(patch.object(compiler, "_compiles_on", lambda kind: kind == "cuda"))
        stack.enter_context(patch.object(compiler, "_compiled", compile_function))
        # Checkpointing compares a block's tensors with those of its second pass, device included.
        checks = checkpoint._allowed_determinism_checks_to_fns
        stack.enter_context(patch.dict(checks, default=lambda tensor: None))
        stack.enter_context(patch.object(MixtureOfExperts, "loads", _even_loads))
        # The backward pass of tensors on a GPU would otherwise run in a thread without the mode.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        _forget_tables()
        stack.callback(_forget_tables)
        yield stack.enter_context(Simulated(device))


class Simulated(TorchFunctionMode):
    """Makes tensors on the meta device look, be cast and attend as those of `device`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        # The autocast rules of every accelerator are those of CUDA.
        self.rules = "cpu" if device.type == "cpu" else "cuda"
        self.attention_kernels: list[str] = []  # taken, in order

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in GETTERS:
            return GETTERS[func](self.device) if args[0].is_meta else func(*args)
        if func is not torch.device:
            args = tuple(self._on_meta(value) for value in args)
            kwargs = {name: self._on_meta(value) for name, value in (kwargs or {}).items()}
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is Tensor.backward:
            return self._backward(args[0])
        if func in CONSTRUCTORS and kwargs.get("device") is None:
            kwargs["device"] = META
        if torch.is_autocast_enabled(self.device.type):
            args, kwargs = self._autocast(name, args, kwargs)
        if name == "scaled_dot_product_attention":
            return self._attention(func, *args, **kwargs)
        if name == "rms_norm" and self.device.type != "cpu":
            # A kernel of CUDA's, which meta tensors lack. This one is as large and keeps as much.
            states, shape, weight, eps = _rms_norm_arguments(*args, **kwargs)
            return F.layer_norm(states, shape, weight, None, eps)
        return func(*args, **kwargs)

    def _backward(self, loss: Tensor) -> None:
        """The backward pass with this mode on: it runs Python code as well.

        Such are gradients that the package defines, and blocks that are computed again.
        """
        gradient = torch.ones_like(loss)
        with self:
            _engine_run_backward(
                (loss,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
            )

    def _on_meta(self, value: Any) -> Any:
        """The device that is simulated, where an argument names it, replaced by the meta device."""
        named = isinstance(value, torch.device | str) and str(value).split(":")[0]
        return META if named == self.device.type else value

    def _autocast(self, name: str, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if name in COMPUTE_DTYPE:
            dtype = torch.get_autocast_dtype(self.device.type)
        elif name in FP32[self.rules] and kwargs.get("dtype") is None:
            dtype = torch.float32
        elif name in WIDEST[self.rules]:
            wide = any(leaf.dtype == torch.float32 for leaf in tree_leaves(args) if _is_cast(leaf))
            dtype = torch.float32 if wide else torch.get_autocast_dtype(self.device.type)
        else:
            return args, kwargs

        def cast(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(map(cast, value))
            return value.to(dtype) if _is_cast(value) else value

        return cast(args), {name: cast(value) for name, value in kwargs.items()}

    def _attention(  # noqa: PLR0913 (PyTorch's own arguments, and the function itself)
        self,
        plain: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        kind = self.device.type
        kernel = attention_kernel(queries, keys, attn_mask, enable_gqa, kind)
        self.attention_kernels.append(kernel)
        options: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        if kernel == "math":  # as every tensor on the meta device
            return plain(queries, keys, values, attn_mask, **options, enable_gqa=enable_gqa)
        aten = torch.ops.aten
        if kernel == "flash" and kind != "cpu":
            return aten._scaled_dot_product_flash_attention(queries, keys, values, **options)[0]
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            zeros = torch.zeros_like(attn_mask, dtype=queries.dtype)
            attn_mask = zeros.masked_fill(~attn_mask, -torch.inf)
        if kernel == "flash":
            return aten._scaled_dot_product_flash_attention_for_cpu(
                queries, keys, values, attn_mask=attn_mask, **options
            )[0]
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*queries.shape[:3], keys.shape[2])
        keeps = torch.is_grad_enabled() and any(it.requires_grad for it in (queries, keys, values))
        return aten._scaled_dot_product_efficient_attention(
            queries, keys, values, attn_mask, keeps, **options
        )[0]


# What is answered for a tensor on the meta device, by the method that asks.
GETTERS = {
    getattr(Tensor, name).__get__: answer
    for name, answer in {
        "device": lambda device: device,
        "is_cuda": lambda device: device.type == "cuda",
        "is_cpu": lambda device: device.type == "cpu",
    }.items()
}


def _forget_tables() -> None:
    """Constants that are kept for a device: real ones, or ones without contents."""
    for kept in (eight_bit.tables, quantization._nf4_pairs):
        kept.cache_clear()


def _even_loads(experts: MixtureOfExperts, used: Tensor) -> list[int]:
    """Tokens of each expert, as if the router chose each of them equally often."""
    count, choices = len(experts.experts), len(used) * experts.per_token
    return [choices * (number + 1) // count - choices * number // count for number in range(count)]


def _rms_norm_arguments(states, shape, weight=None, eps=None):
    return states, shape, weight, eps or 1e-6


def _is_cast(value: Any) -> bool:
    """Whether autocast would look at an argument."""
    return isinstance(value, Tensor) and value.is_meta and value.is_floating_point()
