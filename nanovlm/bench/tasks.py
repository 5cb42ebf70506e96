"""The tasks that are measured, and their inputs."""

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanovlm.bench.models import IMAGE_SIZE, BenchModel, Inputs
from nanovlm.inputs.chat import IGNORED
from nanovlm.utils.device import peak_memory

VISUAL_TOKENS = 256
NEW_TOKENS = 64  # decoded after the first one
# Of each task: rows, tokens of text behind the visual ones, and how many of them are labelled.
SHAPES = {
    "encode": (32, 32, 16),
    "stage1": (8, 32, 16),
    "stage2": (4, 64, 32),
    "generate": (1, 24, 1),
}
MIN_SECONDS = 0.5  # behind each figure; faster work is repeated


@dataclass(frozen=True)
class Row:
    """A row of the table. A rate is better when it is high, a time or a size when it is low."""

    task: str
    title: str
    unit: str

    def best(self, figures: Iterable[float]) -> float:
        """The one that other programs on the machine disturbed least."""
        return max(figures) if self.unit.endswith("/s") else min(figures)

    def ratio(self, figure: float, other: float) -> float:
        """Above 1 where `figure` is better than `other`."""
        return figure / other if self.unit.endswith("/s") else other / figure


ROWS = {
    "encode": Row("encode", "image encoding, 32 of 224×224", "images/s"),
    "stage1": Row("stage1", "stage 1 step, 8 × (256 + 32), 16 labelled", "samples/s"),
    "stage2": Row("stage2", "stage 2 step, 4 × (256 + 64), 32 labelled", "samples/s"),
    "first_token": Row("generate", "first token, 256 + 24", "s"),
    "decode": Row("generate", "decoding, 64 tokens", "tokens/s"),
    "memory": Row("memory", "peak memory of stage 2", "GB"),
}


class Bench:
    """The tasks, on one device and in one dtype.

    Each returns a function that measures once and returns row → figure. The caller discards the
    first measurement, which is the warm-up.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, image_token_id: int) -> None:
        self.device, self.dtype, self.image_token_id = device, dtype, image_token_id

    def inputs(self, batch: int, text_length: int, labelled: int) -> Inputs:
        """Random pixels and text, the same on every call.

        The last `labelled` tokens of each row have labels.
        """
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        # All ids lie below the placeholder's.
        text = torch.randint(self.image_token_id, (batch, text_length), generator=generator)
        placeholders = torch.full((batch, VISUAL_TOKENS), self.image_token_id)
        input_ids = torch.cat((placeholders, text), dim=1)
        labels = torch.full_like(input_ids, IGNORED)
        labels[:, -labelled:] = input_ids[:, -labelled:]
        device = self.device
        return Inputs(pixels.to(device, self.dtype), input_ids.to(device), labels.to(device))

    def encode(self, model: BenchModel) -> Callable[[], dict[str, float]]:
        pixels = self.inputs(*SHAPES["encode"]).pixels

        @torch.inference_mode()
        def run() -> Tensor:
            return model.encode(pixels)

        return lambda: {"encode": len(pixels) / self.seconds(run)}

    def stage1(self, model: BenchModel) -> Callable[[], dict[str, float]]:
        inputs = self.inputs(*SHAPES["stage1"])
        step = self.training_step(model, inputs, ("projector",))
        return lambda: {"stage1": len(inputs.pixels) / self.seconds(step)}

    def stage2(self, model: BenchModel) -> Callable[[], dict[str, float]]:
        inputs = self.inputs(*SHAPES["stage2"])
        step = self.training_step(model, inputs, ("projector", "language_model"))
        return lambda: {"stage2": len(inputs.pixels) / self.seconds(step)}

    def training_step(
        self, model: BenchModel, inputs: Inputs, trainable: tuple[str, ...]
    ) -> Callable[[], None]:
        """Forward, backward and AdamW, all in the dtype of the weights."""
        for part in ("vision_encoder", "projector", "language_model"):
            getattr(model, part).requires_grad_(part in trainable)
        parameters = [
            parameter for part in trainable for parameter in getattr(model, part).parameters()
        ]
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
        prepared = model.prepare(inputs)

        def step() -> None:
            model.loss(prepared).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def generate(self, model: BenchModel) -> Callable[[], dict[str, float]]:
        prepared = model.prepare(self.inputs(*SHAPES["generate"]))

        def measure() -> dict[str, float]:
            times = []
            gc.collect()
            self.wait()
            start = time.perf_counter()
            model.generate(prepared, 1 + NEW_TOKENS, lambda: times.append(time.perf_counter()))
            return {"first_token": times[0] - start, "decode": NEW_TOKENS / (times[-1] - times[0])}

        return measure

    def seconds(self, function: Callable[[], object]) -> float:
        """The time of one call, averaged over as many calls as take MIN_SECONDS."""
        gc.collect()
        self.wait()
        start, calls = time.perf_counter(), 0
        while calls == 0 or time.perf_counter() - start < MIN_SECONDS:
            function()
            self.wait()
            calls += 1
        return (time.perf_counter() - start) / calls

    def wait(self) -> None:
        """Until the device has finished all work that was launched."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def peak_memory(self, model: BenchModel) -> float:
        """The peak of the process (CUDA: of the device) in GB, after two steps of stage 2."""
        inputs = self.inputs(*SHAPES["stage2"])
        step = self.training_step(model, inputs, ("projector", "language_model"))
        step()
        step()
        self.wait()
        return peak_memory(self.device) / 1e9


def compare(bench: Bench, nanovlm: BenchModel, transformers: BenchModel) -> str:
    """A sentence on how far apart the two are on the same input: features, loss, greedy tokens."""
    inputs = bench.inputs(1, 24, 8)
    features, losses, tokens = [], [], []
    for model in (nanovlm, transformers):
        prepared = model.prepare(inputs)
        with torch.inference_mode():
            features.append(model.encode(inputs.pixels).float())
            losses.append(float(model.loss(prepared)))
        tokens.append(model.generate(prepared, 1 + NEW_TOKENS, lambda: None))
    different = (index for index, (one, other) in enumerate(zip(*tokens)) if one != other)
    equal = next(different, len(tokens[0]))
    difference, largest = (features[0] - features[1]).abs().max(), features[1].abs().max()
    return (
        f"on the same input, features differ by at most {float(difference):.2g} of "
        f"{float(largest):.2g} and the loss by {abs(losses[0] - losses[1]):.2g} of "
        f"{losses[1]:.4g}; the first {equal} of {len(tokens[0])} greedy tokens are equal"
    )
