"""Measure nanovlm and transformers on the same work, taking turns in one process.

    python -m nanovlm.bench --weights DIR [--device auto] [--dtype bfloat16] [--rounds 3]
        [--only encode,stage1] [--compile] [--json]

DIR holds `dinov2-small` and `qwen2.5-0.5b` in the hub's format. The table on stdout gives the best
of the rounds and their ratio, above 1 where nanovlm is better, then the share it reaches of what
one large product, or one large read, allows on this device. Without transformers, it gives
nanovlm's figures alone.

    python -m nanovlm.bench --weights DIR --ladder

trains nanovlm alone and adds bf16, packing, compiling and checkpointing one after the other.

    python -m nanovlm.bench --weights DIR --answers

compares ways to answer: weights in 16, 8 and 4 bits, a second turn with and without the cache of
the first, sixteen requests one by one and together.

    python -m nanovlm.bench --estimate rtx-4060 [--preset NAME] [--stage NAME] [--tokens N]
        [--records N] [flags of train_stage1.py]

runs nothing: it says what a training step asks of a GPU and how long it would take there.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from nanovlm.bench import answers, estimate, ladder
from nanovlm.bench.limits import Limits
from nanovlm.bench.models import LANGUAGE_MODEL, VISION_ENCODER, BenchModel, NanoVLMModel
from nanovlm.bench.tasks import ROWS, Bench, compare
from nanovlm.errors import NanoVLMError
from nanovlm.utils.console import run_command, say
from nanovlm.utils.device import (
    DTYPES,
    add_device_flag,
    choose_device,
    choose_dtype,
    reuse_freed_memory,
)
from nanovlm.utils.files import read_json
from nanovlm.utils.parser import CommandParser
from nanovlm.utils.processes import output_of

TASKS = list(dict.fromkeys(row.task for row in ROWS.values()))
LIMIT = "limit"
Figures = dict[str, dict[str, float]]  # row → library, or LIMIT → figure


def main() -> None:
    """Parse the flags, measure, print."""
    own, training_flags = estimate.parser().parse_known_args()
    if own.estimate and not {"-h", "--help"} & set(training_flags):
        print(estimate.report(own, training_flags))
        return
    arguments = _parser().parse_args()
    for name in ("stage", "tokens", "records"):
        if getattr(arguments, name) is not None:
            raise NanoVLMError(f"--{name} belongs to --estimate, and there is none")
    reuse_freed_memory()  # as a run does; it serves both libraries
    device = choose_device(arguments.device)
    dtype, why = choose_dtype(arguments.dtype, device)
    tasks = arguments.only.split(",") if arguments.only else TASKS
    if unknown := [task for task in tasks if task not in TASKS]:
        raise NanoVLMError(f"--only {unknown[0]}: no such task; there are {', '.join(TASKS)}")
    if arguments.rounds < 1:
        raise NanoVLMError("--rounds has to be above 0")
    if arguments.rung:
        figures = ladder.measure(arguments.rung, arguments.weights, device, arguments.rounds)
        print(json.dumps(figures))
        return
    if arguments.ladder:
        figures = ladder.climb(arguments.weights, device, arguments.rounds, list(ladder.RUNGS))
        print(json.dumps(figures) if arguments.json else ladder.table(figures))
        return
    image_token_id = _vocabulary_size(arguments.weights) - 1  # an id that no text here uses
    bench = Bench(device, dtype, image_token_id)
    if arguments.answers:
        figures = answers.measure(arguments.weights, bench, arguments.rounds, arguments.compile)
        print(json.dumps(figures) if arguments.json else answers.table(figures))
        return
    if arguments.peak_memory_of:
        print(bench.peak_memory(_build(arguments.peak_memory_of, bench, arguments)))
        return
    say(
        f"{device}, {str(dtype).removeprefix('torch.')}{', ' + why if why else ''}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
        f"{', blocks compiled' if arguments.compile else ''}"
    )
    names = ["nanovlm", "transformers"]
    if importlib.util.find_spec("transformers") is None:
        names.remove("transformers")
        say("transformers is not installed: nanovlm's figures alone")
    figures = _measure(bench, tasks, names, arguments)
    print(json.dumps(figures) if arguments.json else _table(figures))


def _measure(
    bench: Bench, tasks: list[str], names: list[str], arguments: argparse.Namespace
) -> Figures:
    """All tasks, in the table's order."""
    figures: Figures = {}
    if "memory" in tasks:  # in processes of their own
        figures["memory"] = {name: _peak_memory(name) for name in names}
    if timed := [task for task in tasks if task != "memory"]:
        models = [_build(name, bench, arguments) for name in names]
        if len(models) == 2:
            say(compare(bench, *models))
        limits = Limits(bench)
        for task in timed:
            figures |= _time(bench, task, models, limits, arguments.rounds)
        flops, read = map(max, zip(*limits.speeds))
        say(f"limits: products {flops / 1e9:,.0f} GFLOP/s, reads {read / 1e9:.1f} GB/s")
    return {name: figures[name] for name in ROWS if name in figures}


def _time(
    bench: Bench, task: str, models: list[BenchModel], limits: Limits, rounds: int
) -> Figures:
    """The best of measurements in turn, after one of each model, and of the limit, as warm-up."""
    measure = {model.name: getattr(bench, task)(model) for model in models}
    assert isinstance(models[0], NanoVLMModel)
    measure[LIMIT] = limits.task(task, models[0])
    for warm_up in measure.values():
        warm_up()
    measured = [
        {name: function() for name, function in measure.items()}
        for _ in tqdm(range(rounds), desc=task, unit="round", leave=False)
    ]
    return {
        row: {name: ROWS[row].best(one[name][row] for one in measured) for name in measure}
        for row in ROWS
        if ROWS[row].task == task
    }


def _peak_memory(name: str) -> float:
    """In GB, measured by running this command again for one library alone."""
    flags = [*sys.argv[1:], "--peak-memory-of", name]
    return output_of("nanovlm.bench", flags, f"measures the memory of {name}")


def _build(name: str, bench: Bench, arguments: argparse.Namespace) -> BenchModel:
    if name == "transformers":
        from nanovlm.bench.transformers_model import TransformersModel  # may not be installed

        kind = TransformersModel
    else:
        kind = NanoVLMModel
    model = kind(arguments.weights, bench.device, bench.dtype, bench.image_token_id)
    if arguments.compile:
        model.compile()
    return model


def _table(figures: Figures) -> str:
    """A line per row: one figure, or two and their ratio; and the share of the limit."""
    libraries = f"{'nanovlm':>10} {'transformers':>13} {'ratio':>6}"
    lines = [f"{'':44} {'unit':>10} {libraries} {'of limit':>9}"]
    for name, figure in figures.items():
        row, nanovlm, transformers = ROWS[name], figure["nanovlm"], figure.get("transformers")
        other, share = f"{'—':>13} {'—':>6}", "—"
        if transformers:
            other = f"{transformers:13.3g} {row.ratio(nanovlm, transformers):5.2f}×"
        if LIMIT in figure:
            share = f"{row.ratio(nanovlm, figure[LIMIT]):.0%}"
        lines.append(f"{row.title:44} {row.unit:>10} {nanovlm:10.3g} {other} {share:>9}")
    return "\n".join(lines)


def _vocabulary_size(weights: Path) -> int:
    path = weights / LANGUAGE_MODEL / "config.json"
    config = read_json(path)
    if "vocab_size" not in config:
        raise NanoVLMError(f"{path}: key 'vocab_size' is missing")
    return config["vocab_size"]


def _parser() -> CommandParser:
    description = (__doc__ or "").split("\n\n")[0]
    parser = CommandParser(
        prog="python -m nanovlm.bench", description=description, parents=[estimate.parser()]
    )
    parser.add_argument(
        "--weights",
        type=Path,
        required=True,
        metavar="DIR",
        help=f"holds {VISION_ENCODER} and {LANGUAGE_MODEL}",
    )
    add_device_flag(parser)
    parser.add_argument(
        "--dtype", default="bfloat16", choices=list(DTYPES), help="of weights and products"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="measurements of each library, in turn (default 3)"
    )
    parser.add_argument("--only", metavar="TASKS", help=f"some of {','.join(TASKS)}")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the blocks of both models, and on CUDA nanovlm's decoding; with --answers, "
        "measure compiled decoding as well",
    )
    parser.add_argument(
        "--ladder",
        action="store_true",
        help="train with bf16, packing, compiling, checkpointing added in turn",
    )
    parser.add_argument(
        "--answers",
        action="store_true",
        help="compare ways to answer: few bits, a kept cache, many at once",
    )
    parser.add_argument("--rung", choices=list(ladder.RUNGS), help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print JSON: row → library → figure")
    parser.add_argument(
        "--peak-memory-of", choices=["nanovlm", "transformers"], help=argparse.SUPPRESS
    )
    return parser


if __name__ == "__main__":
    run_command(main)
