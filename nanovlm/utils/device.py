"""The device, the compute dtype that is fast on it, and the memory it takes."""

import argparse
import contextlib
import ctypes
import functools
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.utils.deterministic

from nanovlm.errors import NanoVLMError
from nanovlm.utils.console import say

DEVICES = ("cpu", "cuda", "mps")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CPU_BF16_FEATURES = ("avx512_bf16", "amx_bf16", "bf16")  # x86's and Arm's, as PyTorch names them
CUDA_BUILDS = "https://download.pytorch.org/whl/cu130"  # of PyTorch
CUDA_BUILDS_IN_CHINA = "https://mirror.sjtu.edu.cn/pytorch-wheels/cu130"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def add_device_flag(parser: argparse._ActionsContainer) -> None:
    """Give a parser, or a group of its flags, the flag `--device`, for `choose_device`."""
    parser.add_argument("--device", choices=("auto", *DEVICES), default="auto")


def add_machine_flags(parser: argparse._ActionsContainer) -> None:
    """Give a parser, or a group of its flags, `--device` and `--dtype`, for `choose_dtype`."""
    add_device_flag(parser)
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")


def add_compile_flag(parser: argparse._ActionsContainer) -> None:
    """Give a parser, or a group of its flags, `--compile`, for `generate.compile_decoding`."""
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the step that writes a token: for thousands of tokens on a GPU",
    )


def choose_device(name: str = "auto") -> torch.device:
    """The device asked for, or the best one available: CUDA, Apple's MPS, CPU.

    Says once how to install PyTorch with CUDA where there is a GPU that this build cannot use.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if name == "auto":
        if available == ["cpu"]:
            _say_if_torch_lacks_cuda()
        return torch.device(available[0])
    if name not in available:
        raise NanoVLMError(
            f"device {name!r} is not available here; take one of {', '.join(available)}"
        )
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The compute dtype and, where it is not the one asked for, a sentence that says why.

    bf16 is taken where the hardware multiplies in it; elsewhere it is emulated, which is slower
    than fp32 and no more exact. On MPS, where nothing has been measured, only if it is asked for.
    """
    if name in ("float16", "float32"):
        return DTYPES[name], ""
    if name == "auto" and device.type == "mps":
        return torch.float32, "bf16 is not measured on mps, --dtype bfloat16 takes it"
    if _has_fast_bf16(device):
        return torch.bfloat16, ""
    other = "float16" if device.type == "cuda" else "float32"
    return DTYPES[other], f"{device.type} has no fast bf16 here, using {other}"


def _has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(feature) for feature in CPU_BF16_FEATURES)
    return _multiplies_in_bf16(device)


def _multiplies_in_bf16(device: torch.device) -> bool:
    """Found out by a product: MPS has bf16 from macOS 14 on."""
    try:
        ones = torch.ones(2, 2, dtype=torch.bfloat16, device=device)
        return (ones @ ones).tolist() == [[2, 2], [2, 2]]
    except (RuntimeError, TypeError):
        return False


@functools.cache
def _say_if_torch_lacks_cuda() -> None:
    if torch.version.cuda or torch.version.hip or not shutil.which("nvidia-smi"):
        return
    version = torch.__version__.partition("+")[0]
    say(
        "nvidia-smi is installed, but this PyTorch is built for CPUs, so no GPU is used; install "
        f"the build for GPUs: python -m pip install --force-reinstall torch=={version} "
        f"--index-url {CUDA_BUILDS} (in China {CUDA_BUILDS_IN_CHINA})"
    )


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """The context of a forward pass whose products are computed in `dtype`.

    It does not cache casts: each weight is used once, and the cache would hold its copy until the
    end of the pass, even where checkpointing has freed it.
    """
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype, cache_enabled=False)


def allow_tf32(dtype: torch.dtype, device: torch.device) -> bool:
    """Let products of fp32 take TF32 where the device has it (NVIDIA, from Ampere on).

    True where they do. They read 10 bits of each factor's mantissa, as many as fp16 has, add up in
    fp32, and are several times as fast. Convolutions take TF32 by PyTorch's default.
    """
    if dtype != torch.float32 or device.type != "cuda":
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    torch.set_float32_matmul_precision("high")
    return True


def make_deterministic() -> None:
    """Take only operations that give the same bits in every run; others are an error.

    To be called before CUDA starts, when cuBLAS reads its setting. It concerns CUDA: the operations
    of a CPU that are used here are deterministic anyway.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    # It would also fill every new tensor, which takes time and changes nothing: none is read before
    # it is written.
    deterministic = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def check_memory(needed: int, what: str, device: torch.device | None = None) -> None:
    """Refuse what takes `needed` bytes where the device has fewer, before anything is built."""
    if device is not None and device.type == "cuda":
        there, where = torch.cuda.get_device_properties(device).total_memory, "GPU"
    elif hasattr(os, "sysconf"):
        there, where = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "machine"
    else:  # Windows refuses the allocation itself
        return
    if needed > there:
        raise NanoVLMError(
            f"{what} takes {needed / 1e9:.1f} GB, and this {where} has {there / 1e9:.1f} GB of "
            "memory; take a smaller one"
        )


def peak_memory(device: torch.device) -> int:
    """Most bytes in use at once so far: on CUDA by tensors, elsewhere by the whole process.

    0 on Windows, where the standard library cannot say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        # Unlike getrusage, this does not count what the parent process held.
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    if sys.platform == "win32":
        return 0
    import resource  # which Windows lacks

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reserved_memory(device: torch.device) -> int:
    """Most bytes of the card that PyTorch's allocator has held so far; 0 where it is not CUDA's.

    What it holds beyond `peak_memory` are holes between tensors that no other tensor fits into.
    """
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0


def allow_growing_segments() -> None:
    """Have CUDA's allocator map memory page by page: batches of many lengths leave fewer holes.

    It reads this when CUDA starts. A setting of the user's own stays; Windows has no such mapping.
    """
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def reuse_freed_memory() -> None:
    """Let glibc's allocator keep what is freed, up to 32 MB a block, for the next allocation.

    Left to itself it returns freed blocks at the top of its heap to the system, and learns from
    what is freed which blocks to map one by one. A training step frees gigabytes that the next step
    needs again, and each page that comes from the system is zeroed first. Larger blocks, of which
    a few would leave holes as large as a model, are still mapped and unmapped.
    """
    _set_allocator({M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: -1})  # -1: never


def give_back_freed_memory() -> None:
    """Let glibc's allocator return every freed block to the system at once.

    So the memory of a process is that of its live tensors, to compare with predictions. It is slow.
    """
    _set_allocator({M_MMAP_THRESHOLD: 2**16})


def _set_allocator(options: dict[int, int]) -> None:
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # other C libraries have no such settings
        for option, value in options.items():
            libc.mallopt(option, value)
