"""The choice of device and compute dtype."""

import platform
import subprocess
import sys

import pytest
import torch

from nanovlm.errors import NanoVLMError
from nanovlm.utils.device import choose_device, choose_dtype

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
    assert choose_dtype(asked, MPS)[0] == torch.float32 and "mps" in choose_dtype(asked, MPS)[1]
    assert choose_dtype("float16", CPU) == (torch.float16, "")
    assert choose_dtype("float32", CUDA) == (torch.float32, "")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's allocator")
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

    def freed(choice: str) -> float:
        command = [sys.executable, "-c", code, choice]
        return float(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)

    kept, returned = freed("keep"), freed("give back")
    assert kept < 10 and returned > 45
