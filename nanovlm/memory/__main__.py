"""Predict the peak memory of each training stage by term, without allocating it, and what would
make it fit.

    python -m nanovlm.memory --preset mary
    python -m nanovlm.memory --preset dinov2-qwen2.5 --gpu 8 --stage 2 --tokens 512 --batch-size 4
    python -m nanovlm.memory --stage 2 --vision-encoder dinov2-base --language-model qwen2.5-0.5b
        --checkpointing --measure
    python -m nanovlm.memory --preset svlm --forward

All flags of train_stage1.py and train_stage2.py are accepted. --vision-encoder and --language-model
take a folder, of which only config.json is read, or the name of a published shape. GB are 10⁹
bytes. With --gpu, the peak plus 5 % for the allocator's holes and 0.6 GB for the CUDA context is
compared with the card's memory. On a CPU, add what the tokenizer and the records take. There a run
also keeps freed blocks for its next step, which leave holes of about a tenth as much again.
"""

import argparse
import json
import math
import sys

import torch

from nanovlm.errors import NanoVLMError
from nanovlm.hub.shapes import LANGUAGE_MODELS, VISION_ENCODERS
from nanovlm.memory.advice import advice, on_gpu
from nanovlm.memory.forward import forward_report, take_forward
from nanovlm.memory.measure import program_bytes, random_model, take_steps
from nanovlm.memory.predict import TERMS, Prediction, predict
from nanovlm.memory.shapes import batch_shape, model_config
from nanovlm.memory.stages import names_of_stages, stage_settings
from nanovlm.memory.summary import Stage, summary
from nanovlm.training.precision import Precision
from nanovlm.training.settings import Settings
from nanovlm.utils.console import run_command
from nanovlm.utils.device import choose_device, choose_dtype, give_back_freed_memory, peak_memory
from nanovlm.utils.parser import CommandParser
from nanovlm.utils.processes import output_of


def main() -> None:
    """Parse the flags, predict, print."""
    own, flags = _parser().parse_known_args()
    _check(own)
    names = names_of_stages(own.stage, flags)
    if own.forward or own.take_forward:
        settings = stage_settings(names[0], flags)
        numbers = take_forward if own.take_forward else forward_report
        print(numbers(model_config(settings), settings, _precision(settings)))
    elif own.take_steps:
        _take_steps(stage_settings(names[0], flags), own)
    else:
        stages = [_stage(name, stage_settings(name, flags), own) for name in names]
        print(summary(stages), end="\n\n")
        for stage in stages:
            print(_report(stage, own), end="\n\n")


def _check(own: argparse.Namespace) -> None:
    for name in ("gpu", "tokens"):
        if getattr(own, name) < 0:
            raise NanoVLMError(f"--{name} is {getattr(own, name):g}; it has to be above 0")
    if own.gpu and own.measure and not torch.cuda.is_available():
        raise NanoVLMError(
            "--measure with --gpu needs a GPU, and there is none here; leave one of them out"
        )
    if own.forward and (own.gpu or own.measure):
        raise NanoVLMError(
            "--forward trains nothing and runs on this machine; leave --gpu and --measure out"
        )


def _take_steps(settings: Settings, own: argparse.Namespace) -> None:
    """In the process that is measured: train two steps and print the peak memory in bytes."""
    config, precision = model_config(settings), _precision(settings, bool(own.gpu))
    give_back_freed_memory()  # the allocator's holes between tensors are not needed by the steps
    model = random_model(config, settings, precision)
    take_steps(model, batch_shape(config, settings, own.tokens), settings, precision)
    print(json.dumps(peak_memory(precision.device)))


def _precision(settings: Settings, gpu: bool = False) -> Precision:
    if gpu:
        return on_gpu(settings)
    device = choose_device(settings.device)
    return Precision(choose_dtype(settings.dtype, device)[0], device, settings.stochastic_rounding)


def _stage(name: str, settings: Settings, own: argparse.Namespace) -> Stage:
    config, precision = model_config(settings), _precision(settings, bool(own.gpu))
    shape = batch_shape(config, settings, own.tokens)
    prediction = predict(config, settings, shape, precision, program_bytes(precision))
    return Stage(name, settings, config, shape, precision, prediction)


def _report(stage: Stage, own: argparse.Namespace) -> str:
    """A line on the stage, its table, and whatever else the flags ask for."""
    settings, config, shape, precision = stage.settings, stage.config, stage.shape, stage.precision
    image, peak = config.image, stage.prediction.peak
    pairs = ", each with a pair of answers" * (shape.pairs > 0)
    kind = "tiles" if image.max_tiles_per_image > 1 else "images"
    dtype = str(precision.dtype).removeprefix("torch.")
    title = (
        f"{stage.name}: training {settings.train}; {shape.rows} rows of {shape.length} tokens"
        f"{pairs}, {shape.images} {kind} of {image.height}×{image.width}; "
        f"{dtype} on {precision.device.type}"
    )
    lines = [title, _table(stage.prediction)]
    if settings.cache_features:
        features = 1000 * image.max_tiles_per_image * math.prod(config.feature_shape)
        lines.append(
            f"also, on the CPU, {features * precision.dtype.itemsize / 1e9:.2f} GB of features for "
            "each 1000 images (--cache-features)"
        )
    if own.gpu:
        lines.append(advice(config, settings, own.tokens, stage.prediction, own.gpu))
    if own.measure:
        flags = [*sys.argv[1:], "--take-steps", "--stage", stage.name]
        measured = output_of("nanovlm.memory", flags, "measures")
        lines.append(
            f"predicted {peak / 1e9:.3f} GB, measured {measured / 1e9:.3f} GB: "
            f"{peak / measured - 1:+.1%}"
        )
    return "\n".join(lines)


def _table(prediction: Prediction) -> str:
    """Terms in rows, moments in columns."""
    widths = {moment: max(len(moment) + 2, 11) for moment in prediction.moments}
    header = "".join(f"{moment:>{width}}" for moment, width in widths.items())
    lines = [f"{'GB':14}{header}"]
    for term in TERMS:
        values = {moment: terms.get(term, 0) for moment, terms in prediction.moments.items()}
        if any(values.values()):
            lines.append(f"{term:14}" + _cells(values, widths))
    lines.append(f"{'total':14}" + _cells(prediction.totals, widths))
    return "\n".join([*lines, f"peak {prediction.peak / 1e9:.3f} GB"])


def _cells(values: dict[str, float], widths: dict[str, int]) -> str:
    return "".join(
        f"{values[moment] / 1e9:{width}.3f}" if values[moment] else f"{'—':>{width}}"
        for moment, width in widths.items()
    )


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m nanovlm.memory",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "--gpu",
        type=float,
        default=0,
        metavar="GB",
        help="predict for a GPU with this much memory, and how to fit it",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=0,
        metavar="N",
        help="tokens of each of --batch-size rows, images included\n"
        "(default: rows shared or packed as set, 64 text tokens per sample)",
    )
    parser.add_argument(
        "--stage",
        metavar="NAME",
        default="all",
        help="stage to predict: 1, 2, both, or a name such as dpo (default: all of the preset)",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="also train two steps with random weights, and compare",
    )
    parser.add_argument(
        "--forward",
        action="store_true",
        help="only run a forward pass at full size with random weights on an image and a\n"
        "question, and compare",
    )
    parser.add_argument("--take-steps", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--take-forward", action="store_true", help=argparse.SUPPRESS)
    parser.epilog = (
        f"published shapes: --vision-encoder {', '.join(VISION_ENCODERS)}; "
        f"--language-model {', '.join(LANGUAGE_MODELS)}"
    )
    return parser


if __name__ == "__main__":
    run_command(main)
