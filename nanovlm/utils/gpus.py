"""What NVIDIA's GPUs can do at most.

Without sparsity: products in half precision summed in fp32, and in fp32 outside the tensor cores.
Of a laptop's GPU the figures hold at its highest boost clock, which a thin machine does not keep.

Where they come from: of data centres and workstations, NVIDIA's data sheets and white papers, most
of them read in tables that copy them; of H20, H800, L20 and A800 80GB, tables of those who sell or
rent them. Of RTX 2080 Ti, its white paper. Of RTX 6000 Ada and the other GeForce, cores × 2 × boost
clock from published lists; in half precision twice that, and four times of RTX 6000 Ada. White
papers print the same for RTX 3090 and RTX 4090. Memory is what nvidia-smi has printed, but the
nominal size of A800 40GB; of a model sold with several sizes the table has one.
"""

import difflib
import re
from dataclasses import dataclass

import torch

from nanovlm.errors import NanoVLMError

MIB = 2**20
# Generations before Ampere, by a word of their names; they multiply in fp16, but not in bf16.
WITHOUT_BF16 = ("V100", "V100S", "T4", "2080")
# Words that tell no model from another.
MAKERS = {"NVIDIA", "GEFORCE", "TESLA", "GPU", "GENERATION"}
FORM = re.compile(r"\d+GB|SXM\d?|PCIE|HBM\d\w?")  # of a model that is listed without them


@dataclass(frozen=True)
class GPU:
    """A model of GPU."""

    name: str
    half: float  # TFLOP/s of products in bf16 or fp16, summed in fp32
    single: float  # TFLOP/s of products in fp32
    memory_mib: int  # as nvidia-smi shows it
    bandwidth: float  # GB/s between memory and chip

    @property
    def memory(self) -> int:
        """Bytes."""
        return self.memory_mib * MIB

    @property
    def has_bf16(self) -> bool:
        """Whether it multiplies in bf16, and in TF32; every GPU since Ampere does."""
        return not any(word in WITHOUT_BF16 for word in self.name.split())

    def peak(self, dtype: torch.dtype, tf32: bool = False) -> float | None:
        """FLOP/s of products of tensors of `dtype`; None where it has no such products.

        `tf32` rounds the factors of fp32 products to 10 bits, at half of the speed of bf16.
        """
        if dtype == torch.float32:
            return 1e12 * (
                max(self.single, self.half / 2) if tf32 and self.has_bf16 else self.single
            )
        if dtype == torch.bfloat16 and not self.has_bf16:
            return None
        return 1e12 * self.half


GPUS = (
    # data centres
    GPU("B200", 2250, 75, 183359, 7700),
    GPU("H200", 989, 67, 143771, 4800),
    GPU("H200 NVL", 835, 60, 143771, 4800),
    GPU("H100", 989, 67, 81559, 3350),
    GPU("H100 PCIe", 756, 51, 81559, 2000),
    GPU("H100 NVL", 835, 60, 95830, 3900),
    GPU("H800", 989, 67, 81559, 3350),
    GPU("H800 PCIe", 756, 51, 81559, 2000),
    GPU("H20", 148, 44, 97871, 4000),
    GPU("A100 40GB", 312, 19.5, 40960, 1555),
    GPU("A100 80GB", 312, 19.5, 81920, 2039),
    GPU("A100 80GB PCIe", 312, 19.5, 81920, 1935),
    GPU("A800 40GB", 312, 19.5, 40960, 1555),
    GPU("A800 80GB", 312, 19.5, 81920, 2039),
    GPU("A800 80GB PCIe", 312, 19.5, 81920, 1935),
    GPU("A40", 149.7, 37.4, 46068, 696),
    GPU("A30", 165, 10.3, 24576, 933),
    GPU("A10", 125, 31.2, 23028, 600),
    GPU("L40S", 362, 91.6, 46068, 864),
    GPU("L40", 181, 90.5, 46068, 864),
    GPU("L20", 119.5, 59.8, 46068, 864),
    GPU("L4", 121, 30.3, 23034, 300),
    GPU("V100 SXM2 16GB", 125, 15.7, 16384, 900),
    GPU("V100 SXM2 32GB", 125, 15.7, 32768, 900),
    GPU("V100 PCIe 16GB", 112, 14, 16384, 900),
    GPU("V100 PCIe 32GB", 112, 14, 32768, 900),
    GPU("V100S PCIe 32GB", 130, 16.4, 32768, 1134),
    GPU("T4", 65, 8.1, 15360, 320),
    # workstations
    GPU("RTX 6000 Ada", 364.2, 91.1, 49140, 960),
    GPU("RTX A6000", 154.8, 38.7, 49140, 768),
    GPU("RTX A5000", 111.1, 27.8, 24564, 768),
    GPU("RTX A4000", 76.7, 19.2, 16376, 448),
    # desktops
    GPU("RTX 5090", 209.5, 104.8, 32607, 1792),
    GPU("RTX 5080", 112.6, 56.3, 16303, 960),
    GPU("RTX 5070 Ti", 87.9, 43.9, 16303, 896),
    GPU("RTX 5070", 61.7, 30.9, 12227, 672),
    GPU("RTX 5060 Ti", 47.4, 23.7, 16311, 448),
    GPU("RTX 5060", 38.4, 19.2, 8151, 448),
    GPU("RTX 4090", 165.2, 82.6, 24564, 1008),
    GPU("RTX 4090 D", 147.1, 73.5, 24564, 1008),
    GPU("RTX 4080 SUPER", 104.4, 52.2, 16376, 736),
    GPU("RTX 4080", 97.5, 48.7, 16376, 717),
    GPU("RTX 4070 Ti SUPER", 88.2, 44.1, 16376, 672),
    GPU("RTX 4070 Ti", 80.2, 40.1, 12282, 504),
    GPU("RTX 4070 SUPER", 71, 35.5, 12282, 504),
    GPU("RTX 4070", 58.3, 29.1, 12282, 504),
    GPU("RTX 4060 Ti", 44.1, 22.1, 8188, 288),
    GPU("RTX 4060", 30.2, 15.1, 8188, 272),
    GPU("RTX 3090 Ti", 80, 40, 24564, 1008),
    GPU("RTX 3090", 71, 35.6, 24576, 936),
    GPU("RTX 3080 Ti", 68.2, 34.1, 12288, 912),
    GPU("RTX 3080", 59.5, 29.8, 10240, 760),
    GPU("RTX 3070 Ti", 43.5, 21.7, 8192, 608),
    GPU("RTX 3070", 40.6, 20.3, 8192, 448),
    GPU("RTX 3060 Ti", 32.4, 16.2, 8192, 448),
    GPU("RTX 3060", 25.5, 12.7, 12288, 360),
    GPU("RTX 2080 Ti", 53.8, 13.4, 11264, 616),
    # laptops: cores × 2 × highest boost clock, and twice that in half precision
    GPU("RTX 5090 Laptop", 90.7, 45.3, 24463, 896),
    GPU("RTX 5080 Laptop", 70.3, 35.1, 16303, 896),
    GPU("RTX 5070 Ti Laptop", 52.3, 26.1, 12227, 672),
    GPU("RTX 5070 Laptop", 43.3, 21.6, 8151, 384),
    GPU("RTX 5060 Laptop", 33.2, 16.6, 8151, 384),
    GPU("RTX 4090 Laptop", 79.4, 39.7, 16376, 576),
    GPU("RTX 4080 Laptop", 67.7, 33.9, 12282, 432),
    GPU("RTX 4070 Laptop", 40.1, 20.0, 8188, 256),
    GPU("RTX 4060 Laptop", 29.1, 14.6, 8188, 256),
    GPU("RTX 4050 Laptop", 24.3, 12.1, 6141, 192),
    GPU("RTX 3070 Laptop", 33.2, 16.6, 8192, 448),
    GPU("RTX 3060 Laptop", 26.2, 13.1, 6144, 336),
)


def find_gpu(name: str) -> GPU | None:
    """The GPU that `torch.cuda.get_device_name`, or a person, calls `name`; None if not listed.

    Of the models whose words are all in `name` the one with most words counts, and only if what is
    left says nothing but the form: an RTX 4060 Ti is no RTX 4060.
    """
    words = _words(name)
    matching = [gpu for gpu in GPUS if _words(gpu.name) <= words]
    best = max(matching, key=lambda gpu: len(gpu.name.split()), default=None)
    if best is None or not all(map(FORM.fullmatch, words - _words(best.name))):
        return None
    return best


def named_gpu(name: str) -> GPU:
    """The GPU that a person calls `name`, such as rtx-4060; an error of one line for others."""
    if gpu := find_gpu(name):
        return gpu
    known = {gpu.name.lower().replace(" ", "-"): gpu for gpu in GPUS}
    near = difflib.get_close_matches(name.lower().replace(" ", "-"), known, n=3, cutoff=0.0)
    raise NanoVLMError(
        f"the GPU {name!r} is not among the {len(GPUS)} listed in nanovlm/utils/gpus.py; "
        f"near it are {', '.join(near)}"
    )


def _words(name: str) -> set[str]:
    return {word for word in re.split(r"[\s_-]+", name.upper()) if word not in MAKERS}
