"""Predict the peak memory of each training stage by term, without allocating it, and what would make it fit.

    python -m nanovlm.memory --preset mary
    python -m nanovlm.memory --preset dinov2-qwen2.5 --gpu 8 --stage 2 --tokens 512 --batch-size 4
    python -m nanovlm.memory --stage 2 --vision-encoder dinov2-base --language-model qwen2.5-0.5b --checkpointing --measure
    python -m nanovlm.memory --preset svlm --forward

All flags of train_stage1.py and train_stage2.py are taken. --vision-encoder and --language-model need a folder's config.json alone, or are
names of published shapes. GB are 10⁹ bytes. On a GPU its context comes on top, about half a GB outside the allocator; on a
CPU what the tokenizer and the records hold; there a run also keeps holes between its tensors, up to half as much again, unless
--checkpointing asks it to save memory.
"""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

import torch

from nanovlm.errors import NanoVLMError
from nanovlm.hub.shapes import LANGUAGE_MODELS, VISION_ENCODERS
from nanovlm.memory.advice import advice, on_gpu
from nanovlm.memory.forward import forward_report, take_forward
from nanovlm.memory.measure import measured_apart, program_bytes, random_model, take_steps
from nanovlm.memory.predict import TERMS, Prediction, predict
from nanovlm.memory.shapes import feature_shape, model_config, work_of
from nanovlm.memory.summary import Stage, summary
from nanovlm.training.precision import Precision
from nanovlm.training.presets import load_settings, stage_names
from nanovlm.training.settings import ModelSettings, Settings
from nanovlm.utils.console import run_command
from nanovlm.utils.device import choose_device, choose_dtype, give_back_freed_memory, peak_memory
from nanovlm.utils.parser import CommandParser

MODEL = [field.name for field in dataclasses.fields(ModelSettings) if field.name != "init"]


def main() -> None:
    """Read the flags, predict, print."""
    own, flags = _parser().parse_known_args()
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
    names = _names(own.stage, flags)
    if own.forward or own.take_forward:
        settings = _settings(names[0], flags)
        numbers = take_forward if own.take_forward else forward_report
        print(numbers(model_config(settings), settings, _precision(settings)))
        return
    if own.take_steps:  # the process that is measured
        settings = _settings(names[0], flags)
        config, precision = model_config(settings), _precision(settings, bool(own.gpu))
        give_back_freed_memory()  # holes between blocks are the allocator's doing and no need of the training
        take_steps(
            random_model(config, settings, precision),
            work_of(config, settings, own.tokens),
            settings,
            precision,
        )
        print(json.dumps(peak_memory(precision.device)))
        return
    stages = [_stage(name, _settings(name, flags), own) for name in names]
    print(summary(stages), end="\n\n")
    for stage in stages:
        print(_report(stage, own), end="\n\n")


def _names(asked: str, flags: list[str]) -> list[str]:
    """The stages that --stage asks for; of a file without stages, such as a run's settings.toml, the one that it is."""
    if asked == "all":
        return stage_names(flags) or ["run"]
    return (
        ["stage1", "stage2"] if asked == "both" else [f"stage{asked}" if asked.isdigit() else asked]
    )


def _settings(name: str, flags: list[str]) -> Settings:
    """Of a stage; where there is no model yet to start from, with the shapes that stage 1 would have left there."""
    settings = load_settings("stage2", [*flags, "--stage", name])
    other_parts = (
        settings.vision_encoder or settings.language_model
    )  # than those of the model that may be there
    if settings.init and (other_parts or not Path(settings.init, "config.json").exists()):
        first = load_settings(
            "stage1", [*flags, "--train", "projector", "--lora-rank", "0", "--init", settings.init]
        )
        unsaid = [name for name in MODEL if getattr(settings, name) == getattr(Settings, name)]
        settings = dataclasses.replace(settings, **{name: getattr(first, name) for name in unsaid})
    return settings


def _precision(settings: Settings, gpu: bool = False) -> Precision:
    if gpu:
        return on_gpu(settings)
    device = choose_device(settings.device)
    return Precision(choose_dtype(settings.dtype, device)[0], device, settings.stochastic_rounding)


def _stage(name: str, settings: Settings, own: argparse.Namespace) -> Stage:
    config, precision = model_config(settings), _precision(settings, bool(own.gpu))
    work = work_of(config, settings, own.tokens)
    return Stage(
        name,
        settings,
        config,
        work,
        precision,
        predict(config, settings, work, precision, program_bytes(precision)),
    )


def _report(stage: Stage, own: argparse.Namespace) -> str:
    """What a stage is, its table, and whatever else is asked for."""
    settings, config, work, precision = stage.settings, stage.config, stage.work, stage.precision
    lines = [
        f"{stage.name}: training {settings.train}; {work.rows} rows of {work.length} tokens"
        + f"{', each with a pair of answers' * (work.pairs > 0)}, {work.images} "
        f"{'pictures' if config.image.max_tiles_per_image > 1 else 'images'} of {config.image.height}×{config.image.width}; "
        f"{str(precision.dtype).removeprefix('torch.')} on {precision.device.type}",
        _table(stage.prediction),
    ]
    if settings.cache_features:
        kept = (
            math.prod(feature_shape(config, images=1000 * config.image.max_tiles_per_image))
            * precision.dtype.itemsize
        )
        lines.append(
            f"besides, on the CPU, {kept / 1e9:.2f} GB for each 1000 images whose features are kept "
            "(--cache-features)"
        )
    if own.gpu:
        lines.append(advice(config, settings, own.tokens, stage.prediction, own.gpu))
    if own.measure:
        measured, peak = (
            measured_apart([*sys.argv[1:], "--take-steps", "--stage", stage.name]),
            stage.prediction.peak,
        )
        lines.append(
            f"predicted {peak / 1e9:.3f} GB, measured {measured / 1e9:.3f} GB: {peak / measured - 1:+.1%}"
        )
    return "\n".join(lines)


def _table(prediction: Prediction) -> str:
    """Terms in rows, moments in columns."""
    lines = [f"{'GB':14}" + "".join(f"{moment:>11}" for moment in prediction.moments)]
    for term in TERMS:
        values = [terms.get(term, 0) / 1e9 for terms in prediction.moments.values()]
        if any(values):
            lines.append(
                f"{term:14}"
                + "".join(f"{value:11.3f}" if value else f"{'—':>11}" for value in values)
            )
    lines.append(
        f"{'total':14}" + "".join(f"{total / 1e9:11.3f}" for total in prediction.totals.values())
    )
    return "\n".join([*lines, f"peak {prediction.peak / 1e9:.3f} GB"])


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
        help="predict for a GPU of so much memory, and how to fit it",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=0,
        metavar="N",
        help="tokens of each of --batch-size rows, images included\n"
        "(default: rows shared or packed as set, 64 words a sample)",
    )
    parser.add_argument(
        "--stage",
        metavar="NAME",
        default="all",
        help="stage to predict: 1, 2, both of them, or a name such as dpo (default: all of the preset)",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="also take two steps with random weights, and compare",
    )
    parser.add_argument(
        "--forward",
        action="store_true",
        help="build the model at full size with random weights, read an image and a question, and compare",
    )
    parser.add_argument("--take-steps", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--take-forward", action="store_true", help=argparse.SUPPRESS)
    parser.epilog = f"published shapes: --vision-encoder {', '.join(VISION_ENCODERS)}; --language-model {', '.join(LANGUAGE_MODELS)}"
    return parser


if __name__ == "__main__":
    run_command(main)
