"""Pretrain the tiny vision encoder and the tiny language model that ship in nanovlm/assets.

    python data_tools/pretrain_tiny.py --out pretrained  # both, 85 minutes on one busy core
    python data_tools/pretrain_tiny.py --part language_model --out pretrained

The vision encoder is trained on object labels, without any text (pretrain_vision_encoder.py), the
language model on text alone (pretrain_language_model.py). Neither is trained on a held-out pair of
shape and colour, nor on a scene of train, val or novel.
"""

import sys
from pathlib import Path

if __name__ in ("__main__", "__mp_main__"):  # as a script, or in a worker process of one
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# First, because Ctrl-C is one line from here on, also during the slow imports below.
from nanovlm.utils.console import run_command, say

# isort: split
import argparse
import time
from collections.abc import Callable
from functools import partial

from data_tools.pretrain_language_model import pretrain_language_model
from data_tools.pretrain_vision_encoder import pretrain_vision_encoder
from nanovlm.errors import NanoVLMError
from nanovlm.utils.outputs import add_replace_flag, new_folder
from nanovlm.utils.parser import CommandParser, flag

FOLDERS = {"vision_encoder": "tiny-vision-encoder", "language_model": "tiny-language-model"}


def make_part(folder: Path, make: Callable[[Path], dict], replace: bool) -> None:
    """Let `make` fill a folder that then becomes `folder`; print its measurements and the time."""
    started = time.perf_counter()
    with new_folder(folder, "--out", replace=replace) as temporary:
        result = make(temporary)
    say(f"{folder}: {(time.perf_counter() - started) / 60:.1f} minutes")
    for split, shares in result.items():
        shown = ", ".join(f"{name} {share:.2%}" for name, share in shares.items())
        say(f"  {split}, right: {shown}")


def parse_arguments() -> argparse.Namespace:
    """Read and check the flags."""
    parser = CommandParser(
        description="Pretrain the tiny default's vision encoder and language model."
    )
    parts = (*FOLDERS, "all")
    parser.add_argument("--part", choices=parts, default="all", help="what to make (%(default)s)")
    out = Path("nanovlm/assets")
    parser.add_argument("--out", type=Path, default=out, help="folder to write to (%(default)s)")
    add_replace_flag(parser)
    for name, default, text in (
        ("--seed", 0, "seed of the data and of the initial weights"),
        ("--vision-encoder-steps", 3600, "optimizer steps of the vision encoder"),
        ("--scenes", 24000, "labelled scenes for the vision encoder"),
        ("--language-model-steps", 6000, "optimizer steps of the language model"),
        ("--drill-steps", 3000, "optimizer steps on drills that follow"),
        ("--mixed-steps", 3000, "optimizer steps on both in turn, at last"),
        ("--texts", 30000, "texts for the language model"),
    ):
        parser.add_argument(name, type=int, default=default, help=f"{text} (%(default)s)")
    options = parser.parse_args()
    for name, value in vars(options).items():
        least = 0 if name == "seed" else 1
        if type(value) is int and value < least:
            raise NanoVLMError(f"{flag(name)} is {value}; it starts at {least}")
    return options


def main() -> None:
    """Train the parts asked for."""
    options = parse_arguments()
    trainers = {
        "vision_encoder": partial(
            pretrain_vision_encoder,
            seed=options.seed,
            steps=options.vision_encoder_steps,
            scenes=options.scenes,
        ),
        "language_model": partial(
            pretrain_language_model,
            seed=options.seed,
            steps=(options.language_model_steps, options.drill_steps, options.mixed_steps),
            texts=options.texts,
        ),
    }
    for part, train in trainers.items():
        if options.part in (part, "all"):
            make_part(options.out / FOLDERS[part], train, options.replace)


if __name__ == "__main__":
    run_command(main)
