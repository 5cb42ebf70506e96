"""Stage 1: train a new projector between a frozen vision encoder and a frozen language model.

python train_stage1.py                                              # the tiny default, no download
python train_stage1.py --vision-encoder DIR --language-model DIR --data FILE --out runs/mine
"""

# First, because Ctrl-C is one line from here on, also during the slow imports below.
from nanovlm.utils.console import run_command, say

# isort: split
import time
from pathlib import Path

from data_tools.make_scenes import make_scenes
from nanovlm.training.presets import load_settings
from nanovlm.training.recipes import Recipe, next_commands
from nanovlm.training.run import run_stage
from nanovlm.utils.processes import is_main

SCENES = Path("data/scenes")


def main() -> None:
    """Make the toy world's data on first use, then train."""
    settings = load_settings("stage1")
    if Path(settings.data).parent == SCENES and not SCENES.exists():
        draw_scenes()
    # Before training, so that a mistake in a later stage costs nothing.
    commands = next_commands(Recipe.of_command("stage1"), settings)
    run_stage(settings)
    say("next:  " + commands[0])


def draw_scenes() -> None:
    """Draw the toy world once; other processes (torchrun) wait for it."""
    if is_main():
        say(f"{SCENES} is not there yet: drawing it now (data_tools/make_scenes.py)")
        make_scenes(SCENES)
    while not SCENES.exists():
        time.sleep(1)


if __name__ == "__main__":
    run_command(main)
