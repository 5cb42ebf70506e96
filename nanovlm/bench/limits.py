"""What bounds each task: the products that it needs, or the weights that it reads.

The speed of one large product and of one large read are measured on the device itself, in the same
rounds as the tasks, so that a busy machine slows all of them alike.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import nn

from nanovlm.bench.models import NanoVLMModel
from nanovlm.bench.tasks import ROWS, SHAPES, VISUAL_TOKENS, Bench
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.monitor.flops import layer_flops, step_flops
from nanovlm.training.monitor.walk import BatchShape, walk

PRODUCT = 4096  # rows and columns of both matrices
READ = 2**30  # bytes


@dataclass(frozen=True)
class Work:
    """What a task cannot do without."""

    count: int  # images, samples or tokens
    flops: float = 0  # of products
    bytes: float = 0  # of weights that are read


class Limits:
    """The speed of a large product and of a large read."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.speeds: list[tuple[float, float]] = []  # FLOP/s and bytes/s of each measurement
        self._matrix = torch.randn(PRODUCT, PRODUCT).to(bench.device, bench.dtype)
        self._product = torch.empty_like(self._matrix)  # so that no time goes into memory for it
        self._values = torch.ones(READ // 4, device=bench.device)

    def task(self, task: str, model: NanoVLMModel) -> Callable[[], dict[str, float]]:
        """Like a task of `Bench`: measures once and returns row → the figure at these speeds."""
        works = dict(_works(task, model, self.bench))

        def at_most() -> dict[str, float]:
            flops, read = self._measure()
            seconds = {row: work.flops / flops + work.bytes / read for row, work in works.items()}
            return {
                row: seconds[row] if ROWS[row].unit == "s" else work.count / seconds[row]
                for row, work in works.items()
            }

        return at_most

    @torch.inference_mode()
    def _measure(self) -> tuple[float, float]:
        matrix, result = self._matrix, self._product
        product = self.bench.seconds(lambda: torch.mm(matrix, matrix, out=result))
        read = self.bench.seconds(self._values.sum)
        self.speeds.append((2 * PRODUCT**3 / product, READ / read))
        return self.speeds[-1]


def _works(task: str, bench_model: NanoVLMModel, bench: Bench) -> Iterator[tuple[str, Work]]:
    """The rows of a task, and the work of each; a training step's, with what is trainable now."""
    model: VisionLanguageModel = bench_model.model
    batch = bench_model.prepare(bench.inputs(*SHAPES[task]))
    shape = BatchShape.of(batch, VISUAL_TOKENS)
    if task in ("stage1", "stage2"):
        yield task, Work(shape.rows, flops=step_flops(model, shape))
        return
    model.requires_grad_(False)  # so that the forward pass alone is counted
    if task == "encode":
        encoder = takewhile(lambda layer: layer.module is not model.projector, walk(model, shape))
        yield "encode", Work(shape.rows, flops=sum(map(layer_flops, encoder)))
    else:
        language_model = model.language_model
        parts = language_model.blocks, language_model.norm
        read = [*nn.ModuleList(parts).parameters(), language_model.head_weight]
        yield "first_token", Work(1, flops=step_flops(model, shape))
        yield "decode", Work(1, bytes=sum(weight.nbytes for weight in read))
