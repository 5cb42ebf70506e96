"""The commands of a recipe one after the other: what to run before and after a stage."""

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
        """Read it from a command line (default: this process's); `stage` if that names none."""
        parser = CommandParser(add_help=False)
        for name in ("preset", "config", "stage"):
            parser.add_argument(f"--{name}")
        parser.add_argument("--tiny", action="store_true")
        given, _ = parser.parse_known_args(arguments)
        return cls(given.stage or stage, given.preset, given.config, given.tiny)

    @property
    def flags(self) -> list[str]:
        """The flags that name it."""
        return self._source + ([] if self.stage in STAGES else ["--stage", self.stage])

    @property
    def command(self) -> str:
        """The command that trains the stage, without `python`."""
        return shlex.join([f"train_{self._script}.py", *self.flags])

    @property
    def settings(self) -> Settings:
        """The settings of the stage, without further flags."""
        try:
            return load_settings(self._script, self.flags)
        except NanoVLMError as error:
            raise NanoVLMError(f"{self.command}, which comes next, would fail: {error}") from None

    @property
    def _source(self) -> list[str]:
        flags = []
        flags += ["--preset", self.preset] if self.preset else []
        flags += ["--config", self.config] if self.config else []
        return flags + (["--tiny"] if self.tiny else [])

    @property
    def _script(self) -> str:
        return "stage1" if self.stage in ("words", "stage1") else "stage2"

    def neighbour(self, distance: int) -> "Recipe | None":
        """The stage before (-1) or after (1) this one."""
        stages = stage_names(self._source)
        place = stages.index(self.stage) + distance if self.stage in stages else -1
        return replace(self, stage=stages[place]) if 0 <= place < len(stages) else None


def next_commands(recipe: Recipe, settings: Settings) -> list[str]:
    """What to run after a stage with these settings: a question to its model, and the next stage.

    Stages train on different data, so a run on data of one's own has to be given the next one's;
    but for words, after which stage 1 trains on the same.
    """
    commands, following, model = [], recipe.neighbour(1), Path(settings.out) / "model"
    if settings.resume and not recipe.flags:  # the run may be of any recipe
        following = None
    learned_words = settings.objective == "words"
    if learned_words:
        following = replace(recipe, stage="stage1")
    elif recipe.stage == "stage1":
        following = following or Recipe("stage2")
    else:
        default = settings.out == "runs/stage2"
        flag = "" if default else f" --model {shlex.quote(str(model))}"
        commands.append(f'python infer.py IMAGE "描述图片"{flag}')
    if following is not None:
        planned, usual = following.settings, replace(following, stage=recipe.stage).settings
        known = bool(planned.data) and settings.data == usual.data
        flags = "" if planned.init == str(model) else f" --init {shlex.quote(str(model))}"
        data = shlex.quote(settings.data) if learned_words else "FILE.jsonl"
        flags += "" if known else f" --data {data}"
        before = preparations(planned, model) if known else []
        commands.append(" && ".join([*before, f"python {following.command}{flags}"]))
    return commands


def preparations(settings: Settings, model: str | Path) -> list[str]:
    """The command that makes the toy pairs of answers, if `settings` need them and lack them."""
    if settings.data != TOY_PAIRS or Path(TOY_PAIRS).exists():
        return []
    return [f"python data_tools/make_preferences.py --model {shlex.quote(str(model))}"]
