"""Whole training steps on a CUDA device without contents (`device.py`)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

STEPS = Path(__file__).with_name("steps.py")
INCLUDE = Path(torch.__file__).parent / "include/ATen/detail/CUDAHooksInterface.h"
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(not INCLUDE.exists(), reason="needs PyTorch's C++ headers"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="PyTorch has a CUDA of its own"),
]


def results(which: str) -> dict[str, dict]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(STEPS), which]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    return {case["case"]: case for case in cases}


@pytest.fixture(scope="module")
def kinds() -> dict[str, dict]:
    return results("kinds")


@pytest.fixture(scope="module")
def memory() -> dict[str, dict]:
    return results("memory")


def test_no_kind_of_step_keeps_all_scores_of_attention(kinds):
    taken = {name: set(case["attention"]) for name, case in kinds.items()}
    assert all("math" not in kernels for kernels in taken.values()), taken
    assert taken["bf16"] == taken["fp16"] == taken["checkpointing"] == {"flash"}
    assert taken["fp32"] == {"efficient"}  # flash attention takes half precision only
    assert taken["packed"] == taken["preferences"] == {"flash", "efficient"}  # images; masked rows


def test_rms_norm_gives_the_compute_dtype(kinds):
    for name, case in kinds.items():
        if name != "GPT-2":  # which has layer norms
            assert case["norms"] == [case["dtype"]], name


def test_no_step_waits_for_the_device(kinds):
    assert {name: case["waits"] for name, case in kinds.items() if case["waits"]} == {}


def test_no_operation_mixes_tensors_of_two_devices(kinds):
    assert {name: case["mixed"] for name, case in kinds.items() if case["mixed"]} == {}
    assert {name: case["elsewhere"] for name, case in kinds.items() if case["elsewhere"]} == {}


def test_the_memory_predictor_is_within_one_percent_of_what_lives_on_the_device(memory):
    assert len(memory) == 6
    for name, case in memory.items():
        assert case["predicted"] == pytest.approx(case["live"], rel=0.01), name
