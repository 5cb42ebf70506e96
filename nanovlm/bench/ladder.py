"""The effect of bf16, packing, compiling and checkpointing on training, added one after the other.

Each rung trains the whole language model and the projector (stage 2) with the code of a real run,
on the same samples from the same weights, in a process of its own, so that memory is its own.
"""

import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from nanovlm.bench.models import IMAGE_SIZE, LANGUAGE_MODEL, VISION_ENCODER
from nanovlm.data.collate import collate
from nanovlm.data.packing import first_fit_decreasing, join
from nanovlm.data.sequences import TokenSequence
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
from nanovlm.utils.device import peak_memory
from nanovlm.utils.processes import output_of

SAMPLES = 8  # per step
TEXT_LENGTHS = (16, 224)  # tokens after a sample's 64 visual ones: the fewest and the most
GRID = 8
PACK = 512  # tokens of a packed row


@dataclass(frozen=True)
class Rung:
    """A way to train; each rung adds one thing to the rung before."""

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
    """Measure the rungs `names`, each in a new process: rung → name of the figure → figure."""
    figures: dict[str, dict[str, float]] = {}
    for name in names:
        say(f"{name} …")
        flags = ["--weights", str(weights), "--device", device.type]
        flags += ["--rounds", str(rounds), "--rung", name]
        figures[name] = output_of("nanovlm.bench", flags, f"measures {name!r}")
    return figures


def measure(name: str, weights: Path, device: torch.device, rounds: int) -> dict[str, float]:
    """The figures of one rung.

    Samples and tokens per second without padding (the median of `rounds` steps, after one as
    warm-up), the share of positions that hold a token, peak memory in GB, and the loss of the first
    and the last step.
    """
    rung, settings = RUNGS[name], Settings(train="projector,language_model", lr=1e-5, beta2=0.95)
    precision = Precision(rung.dtype, device)
    model = _build(rung, settings, precision, weights)
    optimizer = build_optimizer(model, settings)
    set_learning_rates(optimizer, 1.0)
    trainable = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    batch, tokens = make_batch(model, rung.packed)
    batch = batch.to(device)
    seconds, losses = [], []
    for _ in range(1 + rounds):
        start = time.perf_counter()
        with precision.autocast():
            loss = model(batch) / len(batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))  # waits for the device
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


def _build(
    rung: Rung, settings: Settings, precision: Precision, weights: Path
) -> VisionLanguageModel:
    """The model as a run sets it up for this rung."""
    torch.manual_seed(0)
    model = join_parts(
        weights / VISION_ENCODER,
        weights / LANGUAGE_MODEL,
        ProjectorConfig("bilinear", GRID),
        ImageConfig(IMAGE_SIZE, IMAGE_SIZE),
    )
    freeze(model, settings)
    precision.place(model)
    if rung.compiled:
        compile_blocks(model, precision.device)
    if rung.checkpointed:
        checkpoint_blocks(model)
    return model


def make_batch(model: VisionLanguageModel, packed: bool) -> tuple[Batch, int]:
    """SAMPLES random samples of random length with an image each; and the number of tokens.

    They are padded or packed.
    """
    lengths, generator = random.Random(0), torch.Generator().manual_seed(0)
    image = model.chat.image_token_id
    rows, tokens = [], 0
    for number in range(SAMPLES):
        length = lengths.randint(*TEXT_LENGTHS)
        text = torch.randint(image, (length,), generator=generator).tolist()
        labels = [IGNORED] * (model.image_length + length // 2) + text[length // 2 :]
        sample = Sample([image] * model.image_length + text, labels)
        rows.append(TokenSequence.of(sample, (Path(str(number)),)))
        tokens += len(labels)
    pixels = torch.randn(SAMPLES, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    if packed:
        rows = [join(row) for row in first_fit_decreasing(rows, PACK)]
        pixels = pixels[[int(path.name) for row in rows for path in row.images]]
    batch = collate(rows, image)
    batch.pixels = pixels
    return batch, tokens


def table(figures: dict[str, dict[str, float]]) -> str:
    """A line per rung.

    Speed and memory are also ratios to the first rung's, losses differences from its losses.
    """
    first, base = next(iter(figures.items()))
    speed = f"{'samples/s':>10}{'':>8}{'tokens/s':>10}"
    lines = [f"{'':18}{speed}{'filled':>8}{'GB':>8}{'':>8}{'Δ loss, first step':>20}{'last':>10}"]
    for name, row in figures.items():
        ratio = {key: row[key] / base[key] for key in ("samples", "memory")}
        delta = {key: row[key] - base[key] for key in ("first_loss", "last_loss")}
        lines.append(
            f"{name:18}{row['samples']:10.3g}{ratio['samples']:7.2f}×{row['tokens']:10.0f}"
            f"{row['fill']:8.0%}{row['memory']:8.2f}{ratio['memory']:7.2f}×"
            f"{delta['first_loss']:+20.5f}{delta['last_loss']:+10.5f}"
        )
    lines.append(
        f"losses of {first}: {base['first_loss']:.3f} at the first step, "
        f"{base['last_loss']:.3f} at the last"
    )
    return "\n".join(lines)
