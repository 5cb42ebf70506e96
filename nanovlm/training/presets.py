"""Where a run's settings come from: the stage of a preset or of a file, then flags."""

import argparse
import dataclasses
import tomllib
from pathlib import Path
from typing import Any

from nanovlm.errors import NanoVLMError
from nanovlm.hub.toy import ASSETS, TOY_LAYERS  # {assets} in a preset stands for the former
from nanovlm.training.settings import FREE_TO_CHANGE, GROUPS, RunSettings, Settings
from nanovlm.utils.config import from_dict, unknown_key
from nanovlm.utils.parser import CommandParser, flag

PRESETS = Path(__file__).parents[1] / "presets"
TOY_PAIRS = "data/scenes/pairs.jsonl"  # made by data_tools/make_preferences.py
STAGES = ("stage1", "stage2")  # those that the two scripts train; a preset may have more
FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
# Settings that were chosen for another one's value: a new value of that one resets them.
CHOSEN_FOR = {
    "lr": ("lr_projector", "lr_language_model", "lr_vision_encoder"),
    "data": ("images", "val"),
}


def load_settings(stage: str, arguments: list[str] | None = None) -> Settings:
    """Settings of `stage` ("stage1" or "stage2"): the preset's or file's, then the flags'."""
    flags = vars(_parser(stage).parse_args(arguments))
    preset, config, stage = flags.pop("preset"), flags.pop("config"), flags.pop("stage")
    path = _source(preset, config)
    if flags["tiny"] and not (preset or config):
        raise NanoVLMError(
            "--tiny shrinks a preset, and the default is as small already; name one with --preset"
        )
    layers = [_read_stage(path, stage)]
    if flags["tiny"]:
        layers.append(_at_toy_size(layers[0]))
    if flags["resume"]:  # a run continues with its own settings
        path = Path(flags["out"] or layers[-1].get("out", Settings.out)) / "settings.toml"
        if not path.exists():
            raise NanoVLMError(
                f"{path}: is not there, so there is no run to continue; start it without --resume"
            )
        layers = [_read_stage(path, stage)]
    layers.append({name: value for name, value in flags.items() if value is not None})
    if flags["resume"] and not flags["allow_changes"]:
        _refuse_changes(layers[0], layers[-1], path)
    values: dict[str, Any] = {}
    for layer in layers:
        for cause, chosen in CHOSEN_FOR.items():
            if cause in layer:
                values = {name: value for name, value in values.items() if name not in chosen}
        values |= layer
    return from_dict(Settings, values, where=str(path))


def stage_names(arguments: list[str] | None = None) -> list[str]:
    """The stages of the preset or file that a command line names.

    A run's `settings.toml`, which is one stage without a name, has none.
    """
    given = _parser("stage1").parse_args(arguments)
    tables = _read_tables(_source(given.preset, given.config))
    return [name for name, values in tables.items() if isinstance(values, dict)]


def _source(preset: str | None, config: str | None) -> Path:
    return Path(config) if config else PRESETS / f"{preset or 'tiny'}.toml"


def _refuse_changes(before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Refuse to continue a run with settings that change its result."""
    may_change = {field.name for field in dataclasses.fields(RunSettings)} | {*FREE_TO_CHANGE}
    changed = [
        f"{flag(name)} {now[name]} (was {before[name]})"
        for name in now
        if name in before and now[name] not in (before[name], "auto") and name not in may_change
    ]
    if changed:
        raise NanoVLMError(
            f"{path}: the run began with other settings, and these would change its result: "
            f"{', '.join(changed)}; leave them out, or give --allow-changes"
        )


def _at_toy_size(values: dict[str, Any]) -> dict[str, Any]:
    """What `--tiny` changes in a preset's stage, besides the model's widths (`hub.toy`).

    The toy data, a folder of its own, fewer and smaller steps, and a learning rate for random
    weights.
    """
    toy = {
        "tiny": True,
        "data": "data/scenes/train.jsonl",
        "val": "data/scenes/val.jsonl",
        "val_samples": 64,
        "max_steps": 200,
        "batch_size": 16,
        "accumulate": 1,
        "lr": 1e-3,
        "dtype": "float32",
        "checkpointing": False,
    }
    if values.get("objective") == "dpo":
        toy |= {"data": TOY_PAIRS, "val": "", "lr": 3e-5}
    for name, most in (
        ("language_model_layers", TOY_LAYERS // 2),
        ("vision_encoder_layers", TOY_LAYERS // 2),
        ("lora_rank", 8),
    ):
        toy[name] = min(values.get(name, 0), most)
    for name in ("out", "init"):
        if name in values:
            toy[name] = values[name].replace("runs/", "runs/tiny-", 1)
    return toy


def _read_tables(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        available = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.toml")))
        raise NanoVLMError(
            f"{path}: cannot be read ({error.strerror}); presets are {available}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise NanoVLMError(f"{path}: is not valid TOML ({error}); mend that line") from None


def _read_stage(path: Path, stage: str) -> dict[str, Any]:
    """The stage's table of a preset, or a whole file without such tables (a `settings.toml`)."""
    table = _read_tables(path)
    stages = [name for name, values in table.items() if isinstance(values, dict)]
    if stage not in table and stages and stage not in STAGES:
        raise NanoVLMError(f"{path}: has no stage {stage!r}; its stages are {', '.join(stages)}")
    values = table.get(stage, {} if stages else table)
    for key in values:
        if key not in FIELDS:
            raise unknown_key(key, FIELDS, f"{path}, [{stage}]")
    return {
        key: value.replace("{assets}", str(ASSETS)) if isinstance(value, str) else value
        for key, value in values.items()
    }


def _number_or_word(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdecimal() else text


def _parser(stage: str) -> CommandParser:
    parser = CommandParser(
        prog=f"train_{stage}.py",
        usage="%(prog)s [--preset NAME | --config FILE.toml] [flags]",
        description=f"Train {stage}; without flags, the tiny default. Flags override the preset.",
    )
    named = parser.add_argument_group("source of settings")
    source = named.add_mutually_exclusive_group()
    presets = ", ".join(sorted(path.stem for path in PRESETS.glob("*.toml")))
    source.add_argument("--preset", metavar="NAME", help=f"a file of nanovlm/presets: {presets}")
    source.add_argument(
        "--config", metavar="FILE.toml", help="your own file, or the settings.toml of a run"
    )
    if stage == "stage1":
        parser.set_defaults(stage=stage)
    else:
        later = "a later stage of it, such as stage3 or dpo"
        named.add_argument("--stage", metavar="NAME", default=stage, help=later)
    for title, group in GROUPS.items():
        shown = parser.add_argument_group(title)
        for field in dataclasses.fields(group):
            options: dict[str, Any] = {"default": None, "help": field.metadata["help"]}
            if field.type in (bool, bool | str):
                options["action"] = argparse.BooleanOptionalAction
            elif isinstance(field.type, type):
                options |= {"type": field.type, "metavar": field.type.__name__.upper()}
            elif field.type == int | str:
                options |= {"type": _number_or_word, "metavar": "auto|INT"}
            shown.add_argument(flag(field.name), **options)
    return parser
