"""The choice of device and compute dtype."""

import os
import platform
import shutil
import subprocess
import sys

import pytest
import torch

from nanovlm.errors import NanoVLMError
from nanovlm.utils import device
from nanovlm.utils.device import allow_tf32, choose_device, choose_dtype, make_deterministic

CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))


def test_the_best_device_is_chosen_and_an_absent_one_refused(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device() == CUDA and choose_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device() == MPS
    with pytest.raises(NanoVLMError, match="'cuda' is not available here; take one of mps, cpu"):
        choose_device("cuda")


@pytest.mark.parametrize("asked", ["auto", "bfloat16"])
def test_bf16_where_it_is_fast_and_a_sentence_where_it_is_not(monkeypatch, asked):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": True})
    assert choose_dtype(asked, CPU) == (torch.bfloat16, "")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    assert choose_dtype(asked, CPU) == (torch.float32, "cpu has no fast bf16 here, using float32")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert choose_dtype(asked, CUDA) == (torch.float16, "cuda has no fast bf16 here, using float16")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert choose_dtype(asked, CUDA) == (torch.bfloat16, "")
    assert choose_dtype("float16", CPU) == (torch.float16, "")
    assert choose_dtype("float32", CUDA) == (torch.float32, "")


def test_mps_takes_bf16_where_it_is_asked_for_and_there(monkeypatch):
    why = "bf16 is not measured on mps, --dtype bfloat16 takes it"
    assert choose_dtype("auto", MPS) == (torch.float32, why)
    assert device._multiplies_in_bf16(CPU)  # the same product as on MPS
    monkeypatch.setattr(device, "_multiplies_in_bf16", lambda device: device == MPS)
    assert choose_dtype("bfloat16", MPS) == (torch.bfloat16, "")
    monkeypatch.undo()
    if not torch.backends.mps.is_available():  # as little as before macOS 14
        no = "mps has no fast bf16 here, using float32"
        assert choose_dtype("bfloat16", MPS) == (torch.float32, no)


def test_a_torch_for_cpus_beside_a_gpu_is_said_once_with_the_command_that_mends_it(
    monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")

    def said(smi: str | None, name: str = "auto") -> str:
        monkeypatch.setattr(shutil, "which", lambda command: smi)
        device._say_if_torch_lacks_cuda.cache_clear()
        assert choose_device(name) == choose_device(name) == CPU
        out, err = capsys.readouterr()
        assert not out
        return err

    assert said("/usr/bin/nvidia-smi") == (
        "nvidia-smi is installed, but this PyTorch is built for CPUs, so no GPU is used; install "
        "the build for GPUs: python -m pip install --force-reinstall torch==2.13.0 "
        "--index-url https://download.pytorch.org/whl/cu130 "
        "(in China https://mirror.sjtu.edu.cn/pytorch-wheels/cu130)\n"
    )
    assert said("/usr/bin/nvidia-smi", "cpu") == said(None) == ""
    monkeypatch.setattr(torch.version, "cuda", "13.0")  # a driver's fault, which PyTorch names
    assert said("/usr/bin/nvidia-smi") == ""
    device._say_if_torch_lacks_cuda.cache_clear()


def test_tf32_where_fp32_trains_on_a_card_that_has_it(monkeypatch):
    before = torch.get_float32_matmul_precision()
    try:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert not allow_tf32(torch.float32, CUDA)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
        assert not allow_tf32(torch.float32, CPU) and not allow_tf32(torch.bfloat16, CUDA)
        assert torch.get_float32_matmul_precision() == before
        assert allow_tf32(torch.float32, CUDA)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_deterministic_sets_all_that_pytorch_offers(any_algorithms, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    make_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_cudas_allocator_maps_pages_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    for given in ("", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        environment = {given: "max_split_size_mb:64"} if given else {}
        monkeypatch.setattr(os, "environ", environment)
        device.allow_growing_segments()
        changed = {} if given else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
        assert os.environ == {**environment, **changed}


glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="a setting of glibc's allocator"
)


def in_a_process(code: str, choice: str) -> float:
    command = [sys.executable, "-c", code, choice]
    return float(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


@glibc
def test_freed_memory_between_blocks_that_stay_is_given_back():
    code = """
import sys
import torch
from nanovlm.utils.device import give_back_freed_memory

def resident():
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) / 1e3

if sys.argv[1] == "give back":
    give_back_freed_memory()
del [torch.ones(2**22)][0]  # 16 MB: from here on glibc, left to itself, keeps smaller blocks
blocks = [torch.ones(2**18) for _ in range(100)]  # 1 MB each
before = resident()
del blocks[::2]
print(before - resident())
"""

    kept, returned = in_a_process(code, "keep"), in_a_process(code, "give back")
    assert kept < 10 and returned > 45


@glibc
def test_a_step_gets_the_memory_that_the_last_one_freed_and_no_new_pages():
    code = """
import resource
import sys
import torch
from nanovlm.utils.device import give_back_freed_memory, reuse_freed_memory

def step():
    activations = [torch.ones(2**20) for _ in range(100)]  # 4 MB each
    while activations:  # the last one first, as a backward pass does
        activations.pop()

reuse_freed_memory() if sys.argv[1] == "reuse" else give_back_freed_memory()
step()
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / 1e6)
"""
    anew, reused = in_a_process(code, "give back"), in_a_process(code, "reuse")
    assert anew > 200 and reused < 20  # MB
