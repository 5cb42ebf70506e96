"""What is measured, and with what input."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanovlm.bench.sides import IMAGE_SIZE, Side, Work
from nanovlm.inputs.chat import IGNORED
from nanovlm.utils.device import peak_memory

VISUAL_TOKENS = 256
NEW_TOKENS = 64  # decoded after the first one
MIN_SECONDS = 0.5  # of work behind each figure; faster work is repeated


@dataclass(frozen=True)
class TokenSequence:
    """A line of the table. `unit` says which way is better: a rate should be high, a time or a size low."""

    task: str
    title: str
    unit: str

    def ratio(self, ours: float, theirs: float) -> float:
        """Above 1 where nanovlm is better."""
        return ours / theirs if self.unit.endswith("/s") else theirs / ours


ROWS = {
    "encode": TokenSequence("encode", "image encoding, 32 of 224×224", "images/s"),
    "stage1": TokenSequence("stage1", "stage 1 step, 8 × (256 + 32), 16 labelled", "samples/s"),
    "stage2": TokenSequence("stage2", "stage 2 step, 4 × (256 + 64), 32 labelled", "samples/s"),
    "first_token": TokenSequence("generate", "first token, 256 + 24", "s"),
    "decode": TokenSequence("generate", "decoding, 64 tokens", "tokens/s"),
    "memory": TokenSequence("memory", "peak memory of stage 2", "GB"),
}


def make_work(
    batch: int,
    text_length: int,
    labelled: int,
    image_token_id: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Work:
    """Random pixels and text, always the same; the last `labelled` tokens of each row are learned."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    text = torch.randint(
        image_token_id, (batch, text_length), generator=generator
    )  # all ids below the placeholder's
    input_ids = torch.cat((torch.full((batch, VISUAL_TOKENS), image_token_id), text), dim=1)
    labels = torch.full_like(input_ids, IGNORED)
    labels[:, -labelled:] = input_ids[:, -labelled:]
    return Work(pixels.to(device, dtype), input_ids.to(device), labels.to(device))


class Bench:
    """The tasks, on one device and in one dtype. Each returns a function that measures once: row → figure.

    Warm-up is the caller's: the first measurement of a task is to be thrown away.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, image_token_id: int) -> None:
        self.device, self.dtype, self.image_token_id = device, dtype, image_token_id

    def work(self, batch: int, text_length: int, labelled: int) -> Work:
        return make_work(batch, text_length, labelled, self.image_token_id, self.device, self.dtype)

    def encode(self, side: Side) -> Callable[[], dict[str, float]]:
        pixels = self.work(32, 32, 16).pixels

        @torch.inference_mode()
        def run() -> Tensor:
            return side.encode(pixels)

        return lambda: {"encode": len(pixels) / self.seconds(run)}

    def stage1(self, side: Side) -> Callable[[], dict[str, float]]:
        step = self.training_step(side, self.work(8, 32, 16), ("projector",))
        return lambda: {"stage1": 8 / self.seconds(step)}

    def stage2(self, side: Side) -> Callable[[], dict[str, float]]:
        step = self.training_step(side, self.work(4, 64, 32), ("projector", "language_model"))
        return lambda: {"stage2": 4 / self.seconds(step)}

    def training_step(
        self, side: Side, work: Work, learning: tuple[str, ...]
    ) -> Callable[[], None]:
        """Forward, backward and AdamW, all in the dtype of the weights."""
        for part in ("vision_encoder", "projector", "language_model"):
            getattr(side, part).requires_grad_(part in learning)
        parameters = [
            parameter for part in learning for parameter in getattr(side, part).parameters()
        ]
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
        prepared = side.prepare(work)

        def step() -> None:
            side.loss(prepared).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def generate(self, side: Side) -> Callable[[], dict[str, float]]:
        prepared = side.prepare(self.work(1, 24, 1))

        def measure() -> dict[str, float]:
            times = []
            gc.collect()
            self.wait()
            start = time.perf_counter()
            side.generate(prepared, 1 + NEW_TOKENS, lambda: times.append(time.perf_counter()))
            return {"first_token": times[0] - start, "decode": NEW_TOKENS / (times[-1] - times[0])}

        return measure

    def seconds(self, function: Callable[[], object]) -> float:
        """The time of one call, on average over as many as fill MIN_SECONDS."""
        gc.collect()
        self.wait()
        start, calls = time.perf_counter(), 0
        while calls == 0 or time.perf_counter() - start < MIN_SECONDS:
            function()
            self.wait()
            calls += 1
        return (time.perf_counter() - start) / calls

    def wait(self) -> None:
        """Until the device has done what it was asked."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def peak_memory(self, side: Side) -> float:
        """GB that the process needed at most (CUDA: on the device), after two steps of stage 2."""
        step = self.training_step(side, self.work(4, 64, 32), ("projector", "language_model"))
        step()
        step()
        self.wait()
        return peak_memory(self.device) / 1e9


def compare(bench: Bench, ours: Side, theirs: Side) -> str:
    """How far apart the two are on the same input: a sentence on features, loss and greedy tokens."""
    work = bench.work(1, 24, 8)
    features, losses, tokens = [], [], []
    for side in (ours, theirs):
        prepared = side.prepare(work)
        with torch.inference_mode():
            features.append(side.encode(work.pixels).float())
            losses.append(float(side.loss(prepared)))
        tokens.append(side.generate(prepared, 1 + NEW_TOKENS, lambda: None))
    equal = next(
        (index for index, (one, other) in enumerate(zip(*tokens)) if one != other), len(tokens[0])
    )
    difference = float((features[0] - features[1]).abs().max())
    return (
        f"on the same input, features differ by at most {difference:.2g} of {float(features[1].abs().max()):.2g} "
        f"and the loss by {abs(losses[0] - losses[1]):.2g} of {losses[1]:.4g}; "
        f"the first {equal} of {len(tokens[0])} greedy tokens are equal"
    )
