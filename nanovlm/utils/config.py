"""Reading settings strictly: a key nobody knows, or a value nobody implements, is an error and never ignored."""

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from nanovlm.errors import NanoVLMError

T = TypeVar("T")

MAX_LAYERS = 1000  # layers are built before any tensor is compared: a damaged number must not fill the memory


# Settings and parts that had other names before version 0.2.
RENAMED = {
    "vision": "vision_encoder",
    "text": "language_model",
    "text_shape": "language_model_shape",
    "text_layers": "language_model_layers",
    "text_embedding": "language_model_embedding",
    "vision_layers": "vision_encoder_layers",
    "lr_text": "lr_language_model",
    "lr_vision": "lr_vision_encoder",
}
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def unknown_key(key: str, known: Collection[str], where: str) -> NanoVLMError:
    """The error for an unknown key, naming its new name or the nearest key that exists."""
    if RENAMED.get(key) in known:
        return NanoVLMError(f"{where}: key {key!r} is now {RENAMED[key]!r}; rename it")
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return NanoVLMError(
        f"{where}: unknown key {key!r}"
        + (f"; did you mean {near[0]!r}?" if near else "; remove it")
    )


def from_dict(cls: type[T], config: Mapping[str, Any], where: str | None = None) -> T:
    """Build a flat dataclass from a dictionary, checking every key and every type. Lists become tuples."""
    where = where or cls.__name__
    if not isinstance(config, Mapping):
        raise NanoVLMError(f"{where}: expected a table of settings, found {type(config).__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {}
    for key, value in config.items():
        if key not in fields:
            raise unknown_key(key, fields, where)
        values[key] = tuple(value) if isinstance(value, list) else value
        expected = fields[key].type
        if dataclasses.is_dataclass(expected):
            values[key] = from_dict(expected, value)
            continue
        if isinstance(expected, type):
            accepted = (int, float) if expected is float else expected
            if not isinstance(values[key], accepted) or (
                isinstance(value, bool) and expected is not bool
            ):
                raise NanoVLMError(
                    f"{where}: {key} is {value!r}, expected {TYPE_NAMES.get(expected, expected.__name__)}"
                )
    missing = [
        name
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise NanoVLMError(f"{where}: key {missing[0]!r} is missing")
    return cls(**values)


def check_numbers(part: Any) -> None:
    """Refuse a number that no part of a model can have: one below 0, or 0 where it is not the default."""
    if getattr(part, "num_hidden_layers", 0) > MAX_LAYERS:
        raise NanoVLMError(
            f"{type(part).__name__}: num_hidden_layers is {part.num_hidden_layers}; "
            f"it has to be at most {MAX_LAYERS}"
        )
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if type(value) in (int, float) and (value < 0 or (value == 0 and field.default != 0)):
            raise NanoVLMError(
                f"{type(part).__name__}: {field.name} is {value}; it has to be above 0"
            )


def check_divides(part: Any, whole: str, share: str) -> None:
    """Refuse a part of which one number is no multiple of another."""
    if getattr(part, whole) % getattr(part, share):
        raise NanoVLMError(
            f"{type(part).__name__}: {whole} = {getattr(part, whole)} is not a multiple of "
            f"{share} = {getattr(part, share)}"
        )


def check(condition: bool, problem: str, where: str) -> None:
    """Raise `where: problem` unless `condition` holds."""
    if not condition:
        raise NanoVLMError(f"{where}: {problem}")
