"""Where a run's settings come from: the stage of a preset or of a file, then flags."""

import argparse
import dataclasses
import json
import os
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanovlm.errors import NanoVLMError, quoted
from nanovlm.hub.shapes import fetched
from nanovlm.hub.toy import ASSETS, TOY_LAYERS
from nanovlm.training.settings import ASSETS_MARK, GROUPS, Settings, deciding
from nanovlm.utils.config import from_dict, unknown_key
from nanovlm.utils.files import read_text
from nanovlm.utils.parser import CommandParser, expand_user, flag
from nanovlm.utils.sniff import FIRST_BYTES, what_is

PRESETS = Path(__file__).parents[1] / "presets"
MAX_SETTINGS = 2**20  # bytes of a file of settings
TOY_PAIRS = "data/scenes/pairs.jsonl"  # made by data_tools/make_preferences.py
STAGES = ("stage1", "stage2")  # those that the two scripts train; a preset may have more
BASE = "base"  # key of a file of stages: the preset whose stages it changes
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
        out = flags["out"] or layers[-1].get("out", Settings.out)
        path = Path(expand_user(str(out))) / "settings.toml"
        if not path.exists():
            raise NanoVLMError(
                f"{path}: is not there, so there is no run to continue; start it without --resume"
            )
        layers = [_read_stage(path, stage)]
    layers.append({name: value for name, value in flags.items() if value is not None})
    values: dict[str, Any] = {}
    for layer in layers:
        values = _overridden(values, layer)
    for part in ("vision_encoder", "language_model"):
        if isinstance(values.get(part), str):
            values[part] = fetched(values[part])
    settings = from_dict(Settings, values, where=str(path))
    if flags["resume"] and not flags["allow_changes"]:
        _refuse_changes(layers[0], settings, layers[-1], path)
    return settings


def _overridden(values: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    """`values` with those of `layer` in their place, and without what was chosen for them."""
    for cause, chosen in CHOSEN_FOR.items():
        if cause in layer:
            values = {name: value for name, value in values.items() if name not in chosen}
    return values | layer


def stage_names(arguments: list[str] | None = None) -> list[str]:
    """The stages of the preset or file that a command line names.

    A run's `settings.toml`, which is one stage without a name, has none.
    """
    given = _parser("stage1").parse_args(arguments)
    return _stages(_with_base(_source(given.preset, given.config)))


def _source(preset: str | None, config: str | None) -> Path:
    return Path(expand_user(config)) if config else PRESETS / f"{preset or 'tiny'}.toml"


def _refuse_changes(
    kept: dict[str, Any], settings: Settings, given: Iterable[str], path: Path
) -> None:
    """Refuse to continue a run with settings that change its result.

    kept: those of its file. given: the names of those that the command line gives.
    """
    if missing := [name for name in FIELDS if name not in kept]:
        raise NanoVLMError(
            f"{path}: lacks {', '.join(missing[:3])}{', …' if missing[3:] else ''}; was it cut "
            "off? Add what the run had, or take the defaults with --allow-changes"
        )
    before = from_dict(Settings, kept, where=str(path))
    was, now = deciding(before), deciding(settings)
    changed = [
        f"{flag(name)} {quoted(now[name])} (was {quoted(was[name])})"
        for name in given
        if name in now and now[name] not in (was[name], "auto")
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
        "stochastic_rounding": False,  # of bf16
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


def read_tables(path: Path) -> dict[str, Any]:
    """The content of a TOML file; `{assets}` in it stands for the folder of what ships.

    A NanoVLMError says where it is broken, or what it is if it is no TOML.
    """
    if not os.path.exists(path):
        raise NanoVLMError(
            f"{path}: cannot be read (there is no such file); presets are "
            f"{', '.join(preset_names())}, and a file of your own is named with --config"
        )
    if path.is_dir():
        raise NanoVLMError(f"{path}: is a folder; name a file, such as {path / 'settings.toml'}")
    text = read_text(path, MAX_SETTINGS)
    assets = json.dumps(str(ASSETS), ensure_ascii=False)[1:-1]
    try:
        tables = tomllib.loads(text.replace(ASSETS_MARK, assets))
    except (ValueError, RecursionError) as error:  # not of TOML alone: numbers of 5,000 digits
        what = what_is(text[:FIRST_BYTES].encode(errors="replace"))
        what = what or {".yaml": "YAML", ".yml": "YAML"}.get(path.suffix.lower())
        if what not in (None, "TOML"):
            raise NanoVLMError(
                f"{path}: is {what}; settings are read from TOML, with lines such as lr = 1e-3"
            ) from None
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise NanoVLMError(f"{path}: is not valid TOML ({reason}); mend that line") from None
    if not tables:
        raise NanoVLMError(f"{path}: holds no settings; was it cut off?")
    return tables


def _with_base(path: Path) -> dict[str, Any]:
    """The content of a file, with the stages of the preset that its `base` names.

    Each stage has the settings of the base's, and those that the file gives in place of them.
    """
    tables = read_tables(path)
    if BASE not in tables:
        return tables
    name = tables.pop(BASE)
    presets = preset_names()
    if not isinstance(name, str) or name not in presets:
        raise NanoVLMError(
            f"{path}: {BASE} is {quoted(name)}, which is no preset; take one of "
            f"{', '.join(presets)}"
        )
    based = _with_base(PRESETS / f"{name}.toml")
    for key, value in tables.items():
        based[key] = _overridden(based.get(key, {}), value) if isinstance(value, dict) else value
    return based


def preset_names() -> list[str]:
    """The presets that ship, in order."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def _stages(tables: dict[str, Any]) -> list[str]:
    return [
        name for name, value in tables.items() if isinstance(value, dict) and name not in FIELDS
    ]


def _read_stage(path: Path, stage: str) -> dict[str, Any]:
    """The stage's table of a preset, or a whole file without such tables (a `settings.toml`)."""
    table = _with_base(path)
    stages = _stages(table)
    if stage in table and stage not in stages:
        raise NanoVLMError(
            f"{path}: {stage} is no table; write the line [{stage}], and its settings below it"
        )
    if stages and stage not in stages:
        known = ", ".join(name[:40] for name in stages[:10])
        raise NanoVLMError(f"{path}: has no stage {stage!r}; its stages are {known}")
    if alone := [key for key in table if stages and key not in stages]:
        raise NanoVLMError(
            f"{path}: {alone[0][:40]} stands outside of the stages; move it below [{stage}]"
        )
    values = table.get(stage, table)
    for key, value in values.items():
        if key not in FIELDS:
            raise unknown_key(key, FIELDS, f"{path}, [{stage}]")
        if isinstance(value, (dict, list)):
            kind = "table" if isinstance(value, dict) else "list"
            raise NanoVLMError(f"{path}, [{stage}]: {key} is a {kind}; give it a single value")
    return values


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
    presets = ", ".join(preset_names())
    source.add_argument("--preset", metavar="NAME", help=f"a file of nanovlm/presets: {presets}")
    source.add_argument(
        "--config", metavar="FILE.toml", help="your own file, or the settings.toml of a run"
    )
    is_first = stage == "stage1"
    other = (
        "words, which comes before stage 1" if is_first else "a later stage, such as stage3 or dpo"
    )
    named.add_argument("--stage", metavar="NAME", default=stage, help=other)
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
