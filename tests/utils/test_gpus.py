"""The table of GPUs: every name finds itself, and no other model's."""

import pytest

from nanovlm.errors import NanoVLMError
from nanovlm.utils.gpus import GPUS, find_gpu, named_gpu


def test_every_listed_gpu_is_found_by_its_name():
    for gpu in GPUS:
        assert find_gpu(f"NVIDIA GeForce {gpu.name} GPU") is gpu
        assert named_gpu(gpu.name.lower().replace(" ", "-")) is gpu


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("Tesla V100-PCIE-16GB", "V100 PCIe 16GB"),
        ("NVIDIA GeForce RTX 4060", "RTX 4060"),
        ("NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti"),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", "RTX 4060 Laptop"),
        ("4060", None),
        ("NVIDIA GeForce RTX 5090 D", None),
        ("AMD Radeon RX 7900 XTX", None),
    ],
)
def test_a_device_is_taken_for_no_other(name: str, listed: str | None):
    gpu = find_gpu(name)
    assert (gpu and gpu.name) == listed


def test_figures_agree_with_each_other():
    """A unit that is wrong by a factor of ten would show here."""
    for gpu in GPUS:
        assert 1.5 <= gpu.half / gpu.single <= 30, gpu
        assert 6000 <= gpu.memory_mib <= 200_000 and 150 <= gpu.bandwidth <= 8000, gpu
        assert gpu.half / gpu.bandwidth < 0.5, gpu


def test_an_unlisted_gpu_is_one_line_with_names_near_it():
    with pytest.raises(NanoVLMError, match="near it are .*rtx-4060") as caught:
        named_gpu("rtx-4061")
    assert "\n" not in str(caught.value)
