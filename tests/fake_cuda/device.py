"""A CUDA device without contents: fake tensors on `cuda`, PyTorch's own autocast, and a record of
what happens to them. Importing this module loads `hooks.cpp`, so it comes before torch."""

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import tempfile
from pathlib import Path

HOOKS = Path(__file__).with_name("hooks.cpp")


def load_hooks() -> None:
    """Compile `hooks.cpp` once for a version of it and of PyTorch, and load it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    version = f"{folder} {os.stat(spec.origin).st_mtime_ns} {HOOKS.read_text()}"
    name = f"nanovlm-hooks-{hashlib.sha256(version.encode()).hexdigest()[:16]}.so"
    library = Path(tempfile.gettempdir()) / name
    if not library.exists():
        built = library.with_suffix(f".{os.getpid()}")
        libraries = (f"-L{folder}/lib", f"-Wl,-rpath,{folder}/lib", "-lc10", "-ltorch_cpu")
        flags = ("-std=c++20", "-O0", "-shared", "-fPIC", f"-I{folder}/include")
        subprocess.run(["g++", *flags, str(HOOKS), "-o", str(built), *libraries], check=True)
        built.rename(library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


load_hooks()

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanovlm.utils import compiler

CUDA = torch.device("cuda", 0)
WAITS = {  # operations whose result, or its shape, the host has to wait for
    *("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero"),
    *("_unique2", "unique_dim", "unique_consecutive"),
}
ATEN = torch.ops.aten
attention_kernels: Counter = Counter()


def attention_order() -> list[str]:
    """The order in which this PyTorch tries its attention kernels below Hopper."""
    header = Path(torch.__file__).parent / "include/ATen/Context.h"
    listed = header.read_text().split("sdp_priority_order = {")[1].split("}")[0]
    return [name.split("::")[-1].strip().removesuffix("_attention") for name in listed.split(",")]


def attention(  # noqa: PLR0913 (PyTorch's own arguments)
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """The first kernel in order that takes these inputs, by the conditions of sdp_utils.cpp."""
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (it.to(torch.get_autocast_dtype("cuda")) for it in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    takes = {
        "flash": attn_mask is None and query.dtype != torch.float32,
        "efficient": not grouped,
        "math": True,
    }
    kernel = next(name for name in attention_order() if takes.get(name))
    attention_kernels[kernel] += 1
    if kernel == "flash":
        return ATEN._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[0]
    if kernel == "efficient":
        bias = attn_mask
        if bias is not None:
            assert bias.dtype == query.dtype, "the kernel would make an additive mask of its own"
            bias = bias.expand(*query.shape[:3], key.shape[2])
        return ATEN._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, 0.0, is_causal
        )[0]
    heads = query.shape[1] // key.shape[1]
    with torch.autocast("cuda", enabled=False):
        query, key, value = query.float(), key.float(), value.float()
        key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
        scores = query @ key.transpose(-2, -1)
        return ATEN._safe_softmax(scores, -1) @ value


def rms_norm(states, shape, weight=None, eps=None):
    """CUDA's kernel is missing here; layer norm's is as large and in the same list of autocast."""
    return nn.functional.layer_norm(states, shape, weight, None, eps)


class Compiled:
    """A function that is compiled on CUDA: what it makes and drops takes no memory there."""

    running = 0

    def __init__(self, function: Any, name: str) -> None:
        self.function, self.compiler = function, self
        self.failed = False

    def __call__(self, *arguments: Any) -> Any:
        Compiled.running += 1
        try:
            return self.function(*arguments)
        finally:
            Compiled.running -= 1


def pretend() -> None:
    """Make PyTorch and nanovlm take a fake tensor on `cuda` for one on a GPU."""
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    nn.functional.scaled_dot_product_attention = attention
    nn.functional.rms_norm = rms_norm
    compiler._compiles_on = lambda device: device == "cuda"
    compiler._compiled = Compiled


def on_cuda(model: nn.Module) -> nn.Module:
    """Fake tensors on `cuda` in place of a model's tensors on the meta device."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = torch.empty(parameter.shape, dtype=parameter.dtype, device=CUDA)
                module._parameters[name] = nn.Parameter(new, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=CUDA)
    return model


class Watch(TorchDispatchMode):
    """Bytes that live on the device, the host's waits, and operations that mix two devices."""

    def __init__(self) -> None:
        super().__init__()
        self.waits, self.mixed = Counter(), Counter()
        self.live = self.peak = 0
        self.large = 0  # elements from which a sum of gradients is taken to be in place
        self._seen: set[int] = set()

    def see(self, tensor: Tensor) -> None:
        """Count a tensor's memory, as the caching allocator rounds it."""
        storage = tensor.untyped_storage()
        address, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        if tensor.device.type != "cuda" or address in self._seen:
            return
        self._seen.add(address)
        self.live += size
        weakref.finalize(storage, self._forget, address, size)
        if not Compiled.running:
            self.peak = max(self.peak, self.live)

    def _forget(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        large = func is ATEN.add.Tensor and args[0].numel() == self.large
        if large and not torch.is_grad_enabled():
            # Two gradients of the tied embedding. Autograd adds them in place, but not to a tensor
            # that Python looks at.
            func = ATEN.add_.Tensor
        result = func(*args, **(kwargs or {}))
        inputs = [it for it in tree_leaves((args, kwargs)) if isinstance(it, Tensor)]
        outputs = [it for it in tree_leaves(result) if isinstance(it, Tensor)]
        devices = {tensor.device.type for tensor in inputs if tensor.dim()}
        if len(devices) > 1 and name not in ("_to_copy", "copy_"):
            self.mixed[name] += 1
        if name in WAITS and "cuda" in devices | {it.device.type for it in inputs}:
            self.waits[name] += 1
        for tensor in outputs:
            self.see(tensor)
        return result
