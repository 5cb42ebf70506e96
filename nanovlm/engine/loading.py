"""A model folder, ready to answer: on its device, in its dtype, with its adapter, in few bits."""

import argparse
import math
from pathlib import Path

import torch

from nanovlm.engine.weight_only import KINDS, quantize_for_answers
from nanovlm.errors import NanoVLMError
from nanovlm.generate import compile_decoding
from nanovlm.hub.adapters import load_adapter
from nanovlm.hub.loading import open_checkpoint
from nanovlm.hub.models import load_model
from nanovlm.hub.shapes import find_model
from nanovlm.model.lora import merge_adapters
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.utils.console import say
from nanovlm.utils.device import (
    add_compile_flag,
    add_machine_flags,
    check_memory,
    choose_device,
    choose_dtype,
)

TRAINED = Path("runs/stage2/model")
SHIPPED = Path(__file__).parents[1] / "assets/tiny-vlm"
BYTES = {"int8": 1.0, "int4": 0.5}  # of a weight, at least


def add_folder_flag(parser: argparse._ActionsContainer) -> None:
    """Give a parser the flag `--model`, for `load_chosen`."""
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help=f"model folder, trained here or published (default: {TRAINED}, else the shipped one)",
    )


def add_named_folder_flag(parser: argparse._ActionsContainer) -> None:
    """Give a parser `--model` where a model is measured, and so has to be named."""
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="model folder, such as runs/stage2/model",
    )


def load_chosen(arguments: argparse.Namespace) -> tuple[Path, VisionLanguageModel]:
    """The model that --model names, else the one trained here, else the shipped one; its folder.

    Which of them it is goes to stderr.
    """
    folder = arguments.model or (TRAINED if TRAINED.exists() else SHIPPED)
    model = load_for_answers(folder, arguments)
    if folder == SHIPPED:
        say(
            "this is the shipped tiny model: it only knows its toy world of coloured shapes "
            "(data_tools/make_scenes.py)"
        )
    return folder, model


def add_model_flags(parser: argparse._ActionsContainer) -> None:
    """Give a parser, or a group of its flags, what `load_for_answers` takes beside a folder."""
    parser.add_argument(
        "--adapter",
        type=Path,
        metavar="DIR",
        help="adapter folder of a LoRA run, for the model that it was trained on",
    )
    parser.add_argument(
        "--quantize",
        choices=KINDS,
        default="",
        help="the language model's weights in 8 or 4 bits: smaller, and on a CPU faster",
    )
    add_machine_flags(parser)
    add_compile_flag(parser)


def load_for_answers(folder: Path, arguments: argparse.Namespace) -> VisionLanguageModel:
    """Load a model folder as the flags of `add_model_flags` say, and name it on stderr."""
    device = choose_device(arguments.device)
    dtype, why = choose_dtype(arguments.dtype, device)
    few_bits = arguments.quantize  # made of the file's own matrices one by one: none is copied
    _check_fits(folder, device, BYTES.get(few_bits, dtype.itemsize))
    model = load_model(folder, None if few_bits else dtype, aligned=not few_bits)
    if arguments.adapter:
        load_adapter(model, arguments.adapter)
        merge_adapters(model)
    if few_bits:
        quantize_for_answers(model.language_model, few_bits, dtype)
        model.to(dtype)
    model.to(device)
    if arguments.compile:
        compile_decoding(model.language_model)
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    notes = [note for note in (few_bits, why) if note]
    say(f"model: {shown}" + (f" ({'; '.join(notes)})" if notes else ""))
    if arguments.adapter:
        say(f"adapter: {arguments.adapter}")
    return model


def _check_fits(folder: Path, device: torch.device, bytes_a_weight: float) -> None:
    """Refuse a model whose weights alone are more than the memory, before they are read."""
    try:
        checkpoint = open_checkpoint(find_model(folder))
    except NanoVLMError:
        return  # `load_model` says what is wrong with it
    weights = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.keys())
    check_memory(int(weights * bytes_a_weight), f"{folder}: the model", device)
