"""What a training step asks of a GPU and how long it would take there, by arithmetic.

    python -m nanovlm.bench --estimate rtx-4060 [--preset NAME] [--stage NAME] [--tokens N]
        [--records N] [flags of train_stage1.py]

No GPU is needed, and no weights. The step runs on a simulated device (`nanovlm.memory.simulation`),
where every kernel is counted with the bytes that it reads and writes and its FLOPs. A kernel takes
the longer one of two times, that of its bytes and that of its FLOPs, at REACHED of the card's
limits. The host launches kernels one after the other, one each LAUNCH seconds, and the card runs
each as soon as it is launched and the one before it has ended. Loading data is not counted.
"""

import argparse
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from nanovlm.errors import NanoVLMError
from nanovlm.memory.advice import needed
from nanovlm.memory.predict import predict, trace_step
from nanovlm.memory.shapes import batch_shape, model_config, prepared
from nanovlm.memory.stages import names_of_stages, stage_settings
from nanovlm.memory.trace import Kernel, Trace
from nanovlm.training.monitor.flops import step_flops
from nanovlm.training.precision import Precision
from nanovlm.training.settings import Settings
from nanovlm.utils.device import DTYPES
from nanovlm.utils.gpus import GPU, named_gpu
from nanovlm.utils.parser import CommandParser

LAUNCH = 5e-6  # seconds that the host takes for a kernel
REACHED = 0.8  # of a card's peak and of its bandwidth, by large kernels; no GPU was measured
PARTS = {  # of a step, and the moments of a trace that belong to it
    "forward": ("vision encoder", "language model", "output head"),
    "backward": ("backward",),
    "update": ("update",),
}


@dataclass(frozen=True)
class FusedKernel:
    """A kernel, or several that a compiler makes one."""

    moment: str
    dtype: torch.dtype
    bytes: float
    flops: float

    def seconds(self, gpu: GPU) -> float:
        """On `gpu`, once it runs."""
        peak = gpu.peak(self.dtype) or gpu.peak(torch.float16)
        assert peak
        return max(self.bytes / (1e9 * gpu.bandwidth), self.flops / peak) / REACHED


def parser() -> CommandParser:
    """The flags of an estimate, as a parent of the command's parser."""
    parser = CommandParser(add_help=False)
    group = parser.add_argument_group(
        "what a step would take on a GPU, by arithmetic, with the flags of train_stage1.py"
    )
    group.add_argument("--estimate", metavar="GPU", help="such as rtx-4060; nothing is measured")
    group.add_argument(
        "--stage", metavar="NAME", help="1, 2, both, or a name such as dpo (default: all)"
    )
    group.add_argument("--tokens", type=int, metavar="N", help="of each row, images included")
    group.add_argument("--records", type=int, metavar="N", help="trained on, to count the steps")
    return parser


def report(own: argparse.Namespace, flags: list[str]) -> str:
    """The arithmetic of each stage that `flags` name, on the card that `own` names."""
    gpu = named_gpu(own.estimate)
    for name in ("tokens", "records"):
        if (getattr(own, name) or 1) < 1:
            raise NanoVLMError(f"--{name} is {getattr(own, name)}; it has to be above 0")
    if not any(flag.split("=")[0] in ("--preset", "--config") for flag in flags):
        flags = ["--preset", "dinov2-qwen2.5", *flags]
    title = (
        f"{gpu.name}: {gpu.half:g} TFLOP/s in half precision, {gpu.bandwidth:g} GB/s, "
        f"{gpu.memory / 1e9:.2f} GB; a kernel at {REACHED:.0%} of these, "
        f"a launch {LAUNCH * 1e6:g} µs; loading data not counted"
    )
    stages = names_of_stages(own.stage or "all", flags)
    reports = [_stage(name, stage_settings(name, flags), own, gpu) for name in stages]
    return "\n\n".join([title, *reports])


def works(trace: Trace) -> list[FusedKernel]:
    """The kernels of a trace, with those merged that a compiled region runs as one.

    Between two products a compiler makes one kernel of all that is done to each number. It reads
    what was there before and writes what is used later.
    """
    done, merged = [], []
    for kernel in trace.kernels:
        fusible = kernel.region and not kernel.flops
        if merged and not (fusible and kernel.region == merged[0].region):
            done.append(_merge(merged, trace))
            merged = []
        if fusible:
            merged.append(kernel)
        else:
            done.append(FusedKernel(kernel.moment, kernel.dtype, kernel.bytes, kernel.flops))
    return [*done, _merge(merged, trace)] if merged else done


def _merge(kernels: list[Kernel], trace: Trace) -> FusedKernel:
    first, last = kernels[0].event, kernels[-1].event
    start = min(trace.storages[number].born for kernel in kernels for number, _ in kernel.writes)
    moved: dict[tuple[str, int], int] = {}
    for kernel in kernels:
        for number, size in kernel.reads:
            if trace.storages[number].born < min(start, first):
                moved["read", number] = max(size, moved.get(("read", number), 0))
        for number, size in kernel.writes:
            if trace.storages[number].died > last:
                moved["write", number] = max(size, moved.get(("write", number), 0))
    return FusedKernel(kernels[0].moment, kernels[0].dtype, sum(moved.values()), 0)


def step_seconds(kernels: Iterable[FusedKernel], gpu: GPU) -> float:
    """When the card has finished all kernels of a step."""
    launched = finished = 0.0
    for kernel in kernels:
        launched += LAUNCH
        finished = max(launched, finished) + kernel.seconds(gpu)
    return finished


def _stage(name: str, settings: Settings, own: argparse.Namespace, gpu: GPU) -> str:
    dtype = DTYPES.get(settings.dtype, torch.bfloat16 if gpu.has_bf16 else torch.float16)
    precision = Precision(dtype, torch.device("cuda"), settings.stochastic_rounding)
    peak = gpu.peak(dtype)
    if peak is None:
        raise NanoVLMError(f"{gpu.name} has no products in bf16; take --dtype float16")
    config = model_config(settings)
    shape = batch_shape(config, settings, own.tokens)
    compiled = settings.compile is not False
    model = prepared(config, settings, precision)
    useful = settings.accumulate * step_flops(model, shape)
    trace = trace_step(model, settings, shape, precision, compiled)
    kernels = works(trace)
    # Of the batches of a step, two at most have been traced; all are alike.
    repeated = settings.accumulate / min(settings.accumulate, 2)
    update = [kernel for kernel in kernels if kernel.moment == "update"]
    batches = [kernel for kernel in kernels if kernel.moment != "update"]
    seconds = repeated * step_seconds(batches, gpu) + step_seconds(update, gpu)
    memory = needed(predict(config, settings, shape, precision, 0).peak)
    fits = "fits" if memory <= gpu.memory else "does not fit"
    title = (
        f"{name}: training {settings.train}; {settings.accumulate} × {shape.rows} rows of "
        f"{shape.length} tokens, {str(dtype).removeprefix('torch.')}"
        f"{', blocks compiled' * compiled}"
    )
    lines = [title, *_table(kernels, repeated, gpu)]
    lines.append(
        f"{seconds:.3g} s a step, {seconds and useful / seconds / peak:.0%} of the peak; "
        f"{memory / 1e9:.2f} GB with the CUDA context and the allocator's holes: {fits}"
    )
    steps = _steps(settings, own.records or 0)
    if steps:
        lines.append(f"{steps:,} steps take {_hours(seconds * steps)} hours")
    else:
        lines.append(
            f"1,000 steps take {_hours(1000 * seconds)} hours; --records N counts the steps"
        )
    return "\n".join(lines)


def _hours(seconds: float) -> str:
    """Two digits of a short time, whole hours of a long one."""
    hours = seconds / 3600
    return f"{hours:.2g}" if hours < 10 else f"{hours:,.0f}"


def _table(kernels: list[FusedKernel], repeated: float, gpu: GPU) -> Iterator[str]:
    """A line for each part of a step, whose forward and backward passes are `repeated`."""
    yield f"{'':10}{'kernels':>9}{'GB moved':>10}{'TFLOP':>8}{'ms':>8}"
    for part, moments in PARTS.items():
        times = 1 if part == "update" else repeated
        chosen = [kernel for kernel in kernels if kernel.moment in moments]
        yield (
            f"{part:10}{times * len(chosen):9,.0f}"
            f"{times * sum(kernel.bytes for kernel in chosen) / 1e9:10.1f}"
            f"{times * sum(kernel.flops for kernel in chosen) / 1e12:8.2f}"
            f"{times * step_seconds(chosen, gpu) * 1e3:8.0f}"
        )


def _steps(settings: Settings, records: int) -> int:
    """Of the run; 0 where the number of records decides and is not given."""
    return settings.max_steps or math.ceil(
        settings.epochs * records / (settings.batch_size * settings.accumulate)
    )
