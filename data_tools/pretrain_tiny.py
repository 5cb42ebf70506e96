"""Pretrain the eyes and the voice of the tiny default, and write them as nanovlm/assets/tiny-vision-encoder and tiny-language-model.

    python data_tools/pretrain_tiny.py --out pretrained              # both, 73 minutes on one busy core
    python data_tools/pretrain_tiny.py --part text --out pretrained  # the voice alone

The eyes learn from object labels, without any text (pretrain_tiny_vision.py); the voice from text alone
(pretrain_tiny_text.py). Neither has met a held-out pair of shape and colour, nor a scene of train, val or novel.
"""

import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

if __name__ in (
    "__main__",
    "__mp_main__",
):  # run as a script, or by a worker of one: the packages are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_tools.pretrain_tiny_text import pretrain_text
from data_tools.pretrain_tiny_vision import pretrain_vision
from nanovlm.errors import NanoVLMError
from nanovlm.utils.console import run_command, say
from nanovlm.utils.parser import CommandParser

FOLDERS = {"vision_encoder": "tiny-vision-encoder", "language_model": "tiny-language-model"}


def make_part(folder: Path, make: Callable[[Path], dict], replace: bool) -> None:
    """Let `make` fill a folder beside `folder` and put that in its place; say what it measured and how long it took."""
    if folder.exists() and not replace:
        raise NanoVLMError(f"{folder}: is already there; choose another --out, or --replace it")
    started, temporary = time.perf_counter(), folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        result = make(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(f"{folder}: {(time.perf_counter() - started) / 60:.1f} minutes")
    for split, shares in result.items():
        shown = ", ".join(f"{name} {share:.2%}" for name, share in shares.items())
        say(f"  {split}, right: {shown}")


def main() -> None:
    """Read the flags and train the parts asked for."""
    parser = CommandParser(description="Pretrain the eyes and the voice of the tiny default.")
    parser.add_argument(
        "--part",
        choices=("vision_encoder", "language_model", "all"),
        default="all",
        help="what to make (%(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("nanovlm/assets"), help="folder to write to (%(default)s)"
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="put the new parts in the place of those that are there",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the data and the first weights (%(default)s)"
    )
    parser.add_argument(
        "--vision-encoder-steps",
        type=int,
        default=3600,
        help="optimizer steps of the eyes (%(default)s)",
    )
    parser.add_argument(
        "--scenes", type=int, default=24000, help="scenes drawn for the eyes (%(default)s)"
    )
    parser.add_argument(
        "--language-model-steps",
        type=int,
        default=6000,
        help="optimizer steps of the voice (%(default)s)",
    )
    parser.add_argument(
        "--drill-steps", type=int, default=3000, help="and of its drills (%(default)s)"
    )
    parser.add_argument(
        "--texts", type=int, default=30000, help="conversations written for the voice (%(default)s)"
    )
    options = parser.parse_args()
    if (
        min(
            options.vision_encoder_steps,
            options.language_model_steps,
            options.drill_steps,
            options.scenes,
            options.texts,
        )
        < 1
    ):
        raise NanoVLMError(
            "--vision-encoder-steps, --language-model-steps, --drill-steps, --scenes and --texts start at 1"
        )
    parts = {
        "vision_encoder": partial(
            pretrain_vision,
            seed=options.seed,
            steps=options.vision_encoder_steps,
            scenes=options.scenes,
        ),
        "language_model": partial(
            pretrain_text,
            seed=options.seed,
            steps=options.language_model_steps,
            drill_steps=options.drill_steps,
            texts=options.texts,
        ),
    }
    for part, make in parts.items():
        if options.part in (part, "all"):
            make_part(options.out / FOLDERS[part], make, options.replace)


if __name__ == "__main__":
    run_command(main)
