"""Which device there is, which number format it is fast in, and how the CPU's allocator treats freed memory."""

import ctypes
import sys
from pathlib import Path

import torch

from nanovlm.errors import NanoVLMError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def choose_device(name: str = "auto") -> torch.device:
    """The device asked for, or the best there is: CUDA, Apple's MPS, CPU."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(device for device, there in available.items() if there))
    if not available[name]:
        raise NanoVLMError(
            f"device {name!r} is not available here; take one of "
            f"{', '.join(device for device, there in available.items() if there)}"
        )
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The number format to compute in and, if it is not the one asked for, a sentence that says why.

    bf16 wherever the hardware multiplies in it; elsewhere it is emulated, slower than fp32 and no more exact.
    """
    if name in ("float16", "float32"):
        return DTYPES[name], ""
    if device.type == "cuda":
        fast, other = torch.cuda.is_bf16_supported(including_emulation=False), "float16"
    elif device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        fast, other = (
            any(capabilities.get(feature) for feature in ("avx512_bf16", "amx_bf16", "bf16")),
            "float32",
        )
    else:
        fast, other = False, "float32"  # MPS has bf16, but not in every operation used here
    if fast:
        return torch.bfloat16, ""
    return DTYPES[other], f"{device.type} has no fast bf16 here, using {other}"


def peak_memory(device: torch.device) -> int:
    """Bytes needed at most so far: on CUDA those that tensors took there, elsewhere those of the whole process.

    0 on Windows, which does not tell without a further package.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (
        sys.platform == "linux"
    ):  # unlike getrusage, this does not count what the parent process held
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    if sys.platform == "win32":
        return 0
    import resource  # which Windows lacks

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def give_back_freed_memory(from_bytes: int = 2**16) -> None:
    """Let glibc's allocator return every freed block of `from_bytes` and more to the system at once.

    By default it comes to keep blocks of up to 32 MB to use again. A training step frees temporary tensors between ones
    that stay, so that the process grows around holes that nothing fits into.
    """
    if sys.platform == "linux" and hasattr(
        libc := ctypes.CDLL(None), "mallopt"
    ):  # elsewhere there is no such setting
        libc.mallopt(M_MMAP_THRESHOLD, from_bytes)
