"""Predict the peak memory of each training stage by term, without allocating it, and what would make it fit.

    python -m nanovlm.memory --preset tiny
    python -m nanovlm.memory --preset dinov2-qwen2.5 --gpu 8 --stage 2 --tokens 512 --batch-size 4
    python -m nanovlm.memory --stage 2 --vision dinov2-base --text qwen2.5-0.5b --checkpointing --measure

All flags of train_stage1.py and train_stage2.py are taken. --vision and --text need a folder's config.json alone, or are
names of published shapes. GB are 10⁹ bytes. On a GPU its context comes on top, about half a GB outside the allocator; on a
CPU what the tokenizer and the records hold; there a run also keeps holes between its tensors, up to half as much again, unless
--checkpointing asks it to save memory.
"""

import argparse
import dataclasses
import math
import sys
from pathlib import Path

import torch

from nanovlm.device import DTYPES, choose_device, choose_dtype, give_back_freed_memory, peak_memory
from nanovlm.errors import CommandParser, NanoVLMError, run
from nanovlm.memory.measure import measured_apart, program_bytes, random_model, take_steps
from nanovlm.memory.predict import TERMS, Prediction, predict
from nanovlm.memory.shapes import Work, feature_shape, model_config, work_of
from nanovlm.shapes import EYES, VOICES
from nanovlm.training.precision import Precision
from nanovlm.training.settings import Settings, load_settings
from nanovlm.vlm import VLMConfig

STAGES = ("stage1", "stage2")


def main() -> None:
    """Read the flags, predict, print."""
    own, flags = _parser().parse_known_args()
    for name in ("gpu", "tokens"):
        if getattr(own, name) < 0:
            raise NanoVLMError(f"--{name} is {getattr(own, name):g}; it has to be above 0")
    if own.gpu and own.measure and not torch.cuda.is_available():
        raise NanoVLMError("--measure with --gpu needs a GPU, and there is none here; leave one of them out")
    for stage in STAGES if own.stage == "both" else (f"stage{own.stage}",):
        settings, config = _stage(stage, flags)
        precision = _precision(settings, on_gpu=bool(own.gpu))
        work = work_of(config, settings, own.tokens)
        if own.take_steps:  # the process that is measured
            give_back_freed_memory()  # holes between blocks are the allocator's doing and no need of the training
            take_steps(random_model(config, settings, precision), work, settings, precision)
            print(peak_memory(precision.device))
            continue
        prediction = predict(config, settings, work, precision, program_bytes(precision))
        print(f"{stage}: training {settings.train}; {work.rows} rows of "
              f"{work.length} tokens, {work.images} images of {config.image.height}×{config.image.width}; "
              f"{str(precision.dtype).removeprefix('torch.')} on {precision.device.type}")
        print(_table(prediction))
        if settings.cache_features:
            patches = feature_shape(config, images=1000)
            print(f"besides, on the CPU, {math.prod(patches) * precision.dtype.itemsize / 1e9:.2f} GB for each 1000 images "
                  "whose features are kept (--cache-features)")
        if own.gpu:
            print(_advice(config, settings, work, prediction, own.gpu))
        if own.measure:
            measured = measured_apart([*sys.argv[1:], "--take-steps", "--stage", stage[-1]])
            print(f"predicted {prediction.peak / 1e9:.3f} GB, measured {measured / 1e9:.3f} GB: "
                  f"{prediction.peak / measured - 1:+.1%}")
        print()


def _stage(stage: str, flags: list[str]) -> tuple[Settings, VLMConfig]:
    """The settings of a stage and the shapes it starts from: where there is no model yet, those of stage 1."""
    settings = load_settings(stage, flags)
    if not (settings.vision or settings.text or Path(settings.init, "config.json").exists()):
        first = dataclasses.asdict(load_settings("stage1", [*flags, "--train", "projector", "--lora-rank", "0"]))
        model = ("vision", "text", "projector", "grid", "scale", "image_size", "vision_layer")
        settings = dataclasses.replace(settings, **{name: first[name] for name in model})
    return settings, model_config(settings)


def _precision(settings: Settings, on_gpu: bool) -> Precision:
    if on_gpu:  # of whatever machine: there may be none here
        return Precision(DTYPES.get(settings.dtype, torch.bfloat16), torch.device("cuda"), settings.stochastic_rounding)
    device = choose_device(settings.device)
    return Precision(choose_dtype(settings.dtype, device)[0], device, settings.stochastic_rounding)


def _table(prediction: Prediction) -> str:
    """Terms in rows, moments in columns."""
    lines = [f"{'GB':14}" + "".join(f"{moment:>11}" for moment in prediction.moments)]
    for term in TERMS:
        values = [terms.get(term, 0) / 1e9 for terms in prediction.moments.values()]
        if any(values):
            lines.append(f"{term:14}" + "".join(f"{value:11.3f}" if value else f"{'—':>11}" for value in values))
    lines.append(f"{'total':14}" + "".join(f"{total / 1e9:11.3f}" for total in prediction.totals.values()))
    return "\n".join([*lines, f"peak {prediction.peak / 1e9:.3f} GB"])


def _advice(config: VLMConfig, settings: Settings, work: Work, prediction: Prediction, gigabytes: float) -> str:
    """Whether it fits and, if not, what to change, the least costly first, each on top of those before it."""
    if prediction.peak <= gigabytes * 1e9:
        return f"fits {gigabytes:g} GB"
    peak, fits = prediction.peak, False
    lines = [f"does not fit {gigabytes:g} GB; with, one after the other:"]
    for flags, changes, fewer_rows in _changes(settings):
        if all(getattr(settings, name) == value for name, value in changes.items()):
            continue
        changed = dataclasses.replace(settings, **changes)
        smaller = Work(1, work.length, work.images // work.rows, work.targets // work.rows) if fewer_rows else work
        if (lower := predict(config, changed, smaller, _precision(changed, on_gpu=True), 0).peak) >= peak:
            continue  # several batches a step need room for the sum of their gradients
        settings, work, peak = changed, smaller, lower
        mark = "  ← the first that fits" if peak <= gigabytes * 1e9 and not fits else ""
        fits = fits or bool(mark)
        lines.append(f"  {flags:58}{peak / 1e9:8.2f} GB{mark}")
    return "\n".join(lines if fits else [*lines, "  nothing of this fits; take a smaller model or shorter rows"])


def _changes(settings: Settings) -> list[tuple[str, dict, bool]]:
    """Flags to say, the settings they are, and whether a batch is one row; by what they cost in time, then in exactness."""
    text = "text" in settings.trained_parts
    accumulate = settings.accumulate * settings.batch_size
    rounding = {} if settings.dtype == "fp16" else {"stochastic_rounding": True, "dtype": "bf16"}
    rank = {"lora_rank": settings.lora_rank or 64} if text else {}
    return [
        ("--dtype bf16", {"dtype": "bf16"} if settings.dtype == "fp32" else {}, False),
        ("--checkpointing", {"checkpointing": True}, False),
        (f"--batch-size 1 --accumulate {accumulate}", {"batch_size": 1, "accumulate": accumulate}, True),
        ("--optimizer adamw8bit", {"optimizer": "adamw8bit"}, False),
        ("--stochastic-rounding", rounding, False),
        ("--lora-rank 64", rank, False),
        ("--quantize nf4" + " --lora-rank 64" * (text and not settings.lora_rank), {"quantize": "nf4", **rank}, False),
    ]


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m nanovlm.memory", description=__doc__,
                           formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gpu", type=float, default=0, metavar="GB",
                        help="predict for a GPU of so much memory, and how to fit it")
    parser.add_argument("--tokens", type=int, default=0, metavar="N",
                        help="tokens of each of --batch-size rows, images included\n"
                             "(default: rows shared or packed as set, 64 words a sample)")
    parser.add_argument("--stage", choices=["1", "2", "both"], default="both", help="stage to predict (default both)")
    parser.add_argument("--measure", action="store_true", help="also take two steps with random weights, and compare")
    parser.add_argument("--take-steps", action="store_true", help=argparse.SUPPRESS)
    parser.epilog = f"published shapes: --vision {', '.join(EYES)}; --text {', '.join(VOICES)}"
    return parser


if __name__ == "__main__":
    run(main)
