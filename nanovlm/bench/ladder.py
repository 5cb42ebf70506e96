"""What each of the means of training brings, one added after the other: bf16, packing, compiling, checkpointing.

Every rung trains the whole decoder and the projector (stage 2) through the parts that a run uses, on the same samples
from the same weights, in a process of its own, so that its memory is its own.
"""

import json
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from nanovlm.bench.sides import IMAGE_SIZE, TEXT, VISION
from nanovlm.data.collate import collate
from nanovlm.data.packing import first_fit_decreasing, join
from nanovlm.data.sequences import TokenSequence
from nanovlm.errors import NanoVLMError
from nanovlm.hub.models import join_parts
from nanovlm.inputs.batch import Batch
from nanovlm.inputs.chat import IGNORED, Sample
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.model.projector import ProjectorConfig
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.blocks import checkpoint_blocks, compile_blocks
from nanovlm.training.freezing import freeze
from nanovlm.training.optim.optimizer import build_optimizer, set_learning_rates
from nanovlm.training.precision import Precision
from nanovlm.training.settings import Settings
from nanovlm.utils.console import say
from nanovlm.utils.device import give_back_freed_memory, peak_memory

SAMPLES = 8  # a step
TEXT_LENGTHS = (
    16,
    224,
)  # tokens of a sample after its 64 visual ones: the shortest and the longest
GRID = 8
PACK = 512  # tokens of a packed row


@dataclass(frozen=True)
class Rung:
    """A way to train; each adds one thing to the one before."""

    dtype: torch.dtype = torch.float32
    packed: bool = False
    compiled: bool = False
    checkpointed: bool = False


RUNGS = {
    "float32": Rung(),
    "+ bf16": Rung(torch.bfloat16),
    "+ packing": Rung(torch.bfloat16, packed=True),
    "+ compile": Rung(torch.bfloat16, packed=True, compiled=True),
    "+ checkpointing": Rung(torch.bfloat16, packed=True, compiled=True, checkpointed=True),
}


def climb(
    weights: Path, device: torch.device, rounds: int, names: list[str]
) -> dict[str, dict[str, float]]:
    """Measure the rungs `names`, each in a fresh process: rung → figure. Differences of loss are against the first."""
    figures: dict[str, dict[str, float]] = {}
    for name in names:
        say(f"{name} …")
        command = [
            sys.executable,
            "-m",
            "nanovlm.bench",
            "--weights",
            str(weights),
            "--device",
            device.type,
            "--rounds",
            str(rounds),
            "--rung",
            name,
        ]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if child.returncode:
            raise NanoVLMError(
                f"the process that measures {name!r} ended with code {child.returncode}; see above"
            )
        figures[name] = json.loads(child.stdout)
    return figures


def measure(name: str, weights: Path, device: torch.device, rounds: int) -> dict[str, float]:
    """One rung: samples and real tokens a second (median of `rounds` steps after one to warm up), share of the slots
    filled, peak memory in GB, and the loss of the first and the last step."""
    rung, settings = RUNGS[name], Settings(train="projector,language_model", lr=1e-5, beta2=0.95)
    torch.manual_seed(0)
    model = join_parts(
        weights / VISION,
        weights / TEXT,
        ProjectorConfig("bilinear", GRID),
        ImageConfig(IMAGE_SIZE, IMAGE_SIZE),
    )
    precision = Precision(rung.dtype, device)
    freeze(model, settings)
    precision.place(model)
    if rung.compiled:
        compile_blocks(model, device)
    if rung.checkpointed:
        checkpoint_blocks(model)
        if device.type == "cpu":  # as a run does
            give_back_freed_memory()
    optimizer = build_optimizer(model, settings)
    set_learning_rates(optimizer, 1.0)
    batch, tokens = make_batch(model, rung.packed)
    batch = batch.to(device)
    seconds, losses = [], []
    for _ in range(1 + rounds):
        start = time.perf_counter()
        with precision.autocast():
            loss = model(batch) / len(batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(
            [parameter for group in optimizer.param_groups for parameter in group["params"]], 1.0
        )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))  # waits for the device, too
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    step = sorted(seconds[1:])[rounds // 2]
    return {
        "samples": SAMPLES / step,
        "tokens": tokens / step,
        "fill": tokens / batch.input_ids.numel(),
        "memory": peak_memory(device) / 1e9,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def make_batch(model: VisionLanguageModel, packed: bool) -> tuple[Batch, int]:
    """SAMPLES random samples of random length, an image each, padded or packed; and their number of real tokens."""
    lengths, generator = random.Random(0), torch.Generator().manual_seed(0)
    image = model.chat.image_token_id
    rows = []
    for number in range(SAMPLES):
        length = lengths.randint(*TEXT_LENGTHS)
        text = torch.randint(image, (length,), generator=generator).tolist()
        labels = [IGNORED] * (model.image_length + length // 2) + text[length // 2 :]
        rows.append(
            TokenSequence.of(
                Sample([image] * model.image_length + text, labels), (Path(str(number)),)
            )
        )
    pixels = torch.randn(SAMPLES, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    if packed:
        rows = [join(line) for line in first_fit_decreasing(rows, PACK)]
        pixels = pixels[[int(path.name) for row in rows for path in row.images]]
    batch = collate(rows, image)
    batch.pixels = pixels
    return batch, int((batch.attention_mask > 0).sum())


def table(figures: dict[str, dict[str, float]]) -> str:
    """One line a rung; speed and memory also as ratios to the first, losses as differences from its own."""
    base = next(iter(figures.values()))
    lines = [
        f"{'':18}{'samples/s':>10}{'':>8}{'tokens/s':>10}{'filled':>8}{'GB':>8}{'':>8}{'Δ loss, first step':>20}{'last':>10}"
    ]
    for name, row in figures.items():
        lines.append(
            f"{name:18}{row['samples']:10.3g}{row['samples'] / base['samples']:7.2f}×{row['tokens']:10.0f}{row['fill']:8.0%}"
            f"{row['memory']:8.2f}{row['memory'] / base['memory']:7.2f}×{row['first_loss'] - base['first_loss']:+20.5f}"
            f"{row['last_loss'] - base['last_loss']:+10.5f}"
        )
    first = next(iter(figures))
    return "\n".join(
        [
            *lines,
            f"losses of {first}: {base['first_loss']:.3f} at the first step, {base['last_loss']:.3f} at the last",
        ]
    )
