"""Stage 2: train the projector and the language model together, to answer questions about images.

python train_stage2.py                                             # goes on from runs/stage1/model
python train_stage2.py --init DIR --data FILE --out runs/mine
"""

# First, because Ctrl-C is one line from here on, also during the slow imports below.
from nanovlm.utils.console import run_command, say

# isort: split
from pathlib import Path

from nanovlm.errors import NanoVLMError
from nanovlm.training.presets import load_settings
from nanovlm.training.recipes import Recipe, next_commands, preparations
from nanovlm.training.run import run_stage


def main() -> None:
    """Train from stage 1's model."""
    settings, recipe = load_settings("stage2"), Recipe.of_command("stage2")
    if settings.init and not Path(settings.init).exists():
        before = recipe.neighbour(-1) or Recipe("stage1")
        raise NanoVLMError(
            f"{settings.init}: there is no model to start from; "
            f"run {before.command} first, or give --init"
        )
    if missing := preparations(settings, settings.init):
        raise NanoVLMError(f"{settings.data}: is not there yet; make it with:  {missing[0]}")
    # Before training, so that a mistake in a later stage costs nothing.
    commands = next_commands(recipe, settings)
    run_stage(settings)
    say("next:  " + commands[0], *(f"  or:  {command}" for command in commands[1:]))


if __name__ == "__main__":
    run_command(main)
