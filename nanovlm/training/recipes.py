"""The commands of a recipe, one after the other: what a run tells its user to type next."""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from nanovlm.errors import NanoVLMError
from nanovlm.training.presets import STAGES, TOY_PAIRS, load_settings, stage_names
from nanovlm.training.settings import Settings
from nanovlm.utils.parser import CommandParser


@dataclass(frozen=True)
class Recipe:
    """Where a command's settings come from: a stage of a preset or of a file."""

    stage: str
    preset: str | None = None
    config: str | None = None
    tiny: bool = False

    @classmethod
    def of_command(cls, stage: str, arguments: list[str] | None = None) -> "Recipe":
        """Read it off a command line, by default this process's, of the script that trains `stage` if none is named."""
        parser = CommandParser(add_help=False)
        for name in ("preset", "config", "stage"):
            parser.add_argument(f"--{name}")
        parser.add_argument("--tiny", action="store_true")
        given, _ = parser.parse_known_args(arguments)
        return cls(given.stage or stage, given.preset, given.config, given.tiny)

    @property
    def flags(self) -> list[str]:
        """What a command has to repeat."""
        return self._source + ([] if self.stage in STAGES else ["--stage", self.stage])

    @property
    def command(self) -> str:
        """The one that trains the stage, as `python` takes it."""
        return shlex.join([f"train_{self._script}.py", *self.flags])

    @property
    def settings(self) -> Settings:
        """Those of the stage, before any other flag."""
        try:
            return load_settings(self._script, self.flags)
        except NanoVLMError as error:
            raise NanoVLMError(f"{self.command}, which comes next, would fail: {error}") from None

    @property
    def _source(self) -> list[str]:
        named = (("--preset", self.preset), ("--config", self.config))
        return [part for flag, value in named if value for part in (flag, value)] + [
            "--tiny"
        ] * self.tiny

    @property
    def _script(self) -> str:
        return "stage1" if self.stage == "stage1" else "stage2"

    def neighbour(self, distance: int) -> "Recipe | None":
        """The stage before (-1) or after (1) this one."""
        stages = stage_names(self._source)
        place = stages.index(self.stage) + distance if self.stage in stages else -1
        return replace(self, stage=stages[place]) if 0 <= place < len(stages) else None


def next_commands(recipe: Recipe, settings: Settings) -> list[str]:
    """What to type after a stage that ran as `settings` say: a question to its model, and the next stage.

    Whoever gave records of their own has to say which ones the next stage learns from: stages learn different things.
    """
    commands, following, model = [], recipe.neighbour(1), Path(settings.out) / "model"
    if settings.resume and not recipe.flags:  # of any recipe
        following = None
    if recipe.stage == "stage1":
        following = following or Recipe("stage2")
    else:
        commands.append(
            'python infer.py IMAGE "描述图片"'
            + ("" if settings.out == "runs/stage2" else f" --model {shlex.quote(str(model))}")
        )
    if following is not None:
        planned, usual = following.settings, replace(following, stage=recipe.stage).settings
        known = planned.data and settings.data == usual.data
        commands.append(
            " && ".join(
                [*(preparations(planned, model) if known else []), f"python {following.command}"]
            )
            + ("" if planned.init == str(model) else f" --init {shlex.quote(str(model))}")
            + ("" if known else " --data FILE.jsonl")
        )
    return commands


def preparations(settings: Settings, model: str | Path) -> list[str]:
    """The command that makes the toy world's pairs of answers, where `settings` name them and they are not there yet."""
    if settings.data != TOY_PAIRS or Path(TOY_PAIRS).exists():
        return []
    return [f"python data_tools/make_preferences.py --model {shlex.quote(str(model))}"]
