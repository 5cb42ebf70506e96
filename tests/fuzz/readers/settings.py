"""Settings files (TOML) of the training scripts."""

import dataclasses
from pathlib import Path
from random import Random

from nanovlm.errors import NanoVLMError
from nanovlm.training.presets import PRESETS, load_settings
from nanovlm.training.settings import Settings, to_toml
from tests.fuzz.damage import NUMBERS, TEXTS, damaged_file, damaged_text
from tests.fuzz.inputs import FaultError, Input, Kind
from tests.fuzz.readers.configs import check_numbers

NAMES = [field.name for field in dataclasses.fields(Settings)]


def make(rng: Random) -> Input:
    """A preset or the settings of a run with some values changed."""
    if rng.random() < 0.3:
        text = rng.choice(sorted(PRESETS.glob("*.toml"))).read_text()
    else:
        text = rng.choice(("", "[stage1]\n")) + to_toml(Settings())
    stage = rng.choice(("stage1", "stage2"))
    return Input(
        {"a.toml": damaged_file(rng, text.encode(), lambda: _damaged(rng, text))}, (stage,)
    )


def _damaged(rng: Random, text: str) -> bytes:
    lines = text.splitlines()
    for _ in range(rng.choice((1, 1, 2))):
        number = rng.randrange(len(lines))
        key = lines[number].partition(" = ")[0]
        what = rng.randrange(5)
        if what == 0:
            lines[number] = damaged_text(rng, lines[number])
        elif what == 1:
            lines.insert(
                number, rng.choice((lines[number], f"[{key}]", f"[[{key}]]", f"{key}.a = 1"))
            )
        elif what == 2:
            lines[number] = f"{rng.choice((*NAMES, *map(str, TEXTS)))} = {_value(rng)}"
        else:
            lines[number] = f"{key} = {_value(rng)}"
    return "\n".join(lines).encode("utf-8", "replace")


def _value(rng: Random) -> str:
    """A value as TOML spells it, or nearly."""
    text = str(rng.choice(TEXTS))
    escaped = "".join(c if c.isprintable() and c not in '"\\' else f"\\u{ord(c):04x}" for c in text)
    number = rng.choice(NUMBERS)
    return rng.choice(
        (
            str(number), f"{number:e}" if abs(number) < 1e300 else str(number), f'"{escaped}"',
            "true", "[1, 2]", "{a = 1}", "1979-05-27T07:32:00Z", "0x7fffffffffffffff", "1_000", "",
            "[" * 3000 + "]" * 3000, "9" * 5000, f"'{text}'", '"""' + text + '"""',
        )
    )  # fmt: skip


def read(input: Input) -> None:
    """Load the settings; written and read again, they are the same."""
    (stage,) = input.arguments
    settings = load_settings(stage, ["--config", "a.toml"])
    check_numbers(dataclasses.asdict(settings))
    folder = Path("written")
    folder.mkdir()
    (folder / "settings.toml").write_text(to_toml(settings), encoding="utf-8")
    try:
        again = load_settings(stage, ["--config", str(folder / "settings.toml")])
    except NanoVLMError as error:
        raise FaultError("settings that were written cannot be read") from error
    if again != settings:
        raise FaultError("settings that were written are read as others")


KIND = Kind("settings", make, read, short=40, long=600)
