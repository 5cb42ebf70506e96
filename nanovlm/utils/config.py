"""Reading settings strictly: an unknown key or a value of the wrong type is an error."""

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Protocol, TypeVar

from nanovlm.errors import NanoVLMError


class Dataclass(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


T = TypeVar("T", bound=Dataclass)

# Layers are built before any tensor is compared: a damaged number must not fill the memory.
MAX_LAYERS = 1000
# Settings and parts by the names they had before version 0.2.
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
# Values of settings by the names they had before version 0.2.
RENAMED_VALUES = {
    "vision": "vision_encoder",
    "text": "language_model",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
}
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def unknown_key(key: str, known: Collection[str], where: str) -> NanoVLMError:
    """The error for an unknown key, naming its new name or the nearest key that exists."""
    if RENAMED.get(key) in known:
        return NanoVLMError(f"{where}: key {key!r} is now {RENAMED[key]!r}; rename it")
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    advice = f"did you mean {near[0]!r}?" if near else "remove it"
    return NanoVLMError(f"{where}: unknown key {key!r}; {advice}")


def from_dict(cls: type[T], config: Mapping[str, Any], where: str | None = None) -> T:
    """Build a flat dataclass from a dictionary, checking every key and type. Lists become tuples.

    `where` (a file, or the name of the class) begins the message of a `NanoVLMError`.
    """
    where = where or cls.__name__
    if not isinstance(config, Mapping):
        raise NanoVLMError(f"{where}: expected a table of settings, found {type(config).__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {}
    for key, value in config.items():
        if key not in fields:
            raise unknown_key(key, fields, where)
        values[key] = _read_value(value, fields[key].type, f"{where}: {key}")
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise NanoVLMError(f"{where}: key {name!r} is missing")
    return cls(**values)


def _read_value(value: Any, expected: Any, where: str) -> Any:
    """The value as a field of type `expected` holds it; only plain types are checked."""
    if not isinstance(expected, type):  # such as `str | None`
        return tuple(value) if isinstance(value, list) else value
    if dataclasses.is_dataclass(expected):
        return from_dict(expected, value)
    read = tuple(value) if isinstance(value, list) else value
    accepted = (int, float) if expected is float else expected
    if not isinstance(read, accepted) or (isinstance(value, bool) and expected is not bool):
        wanted = TYPE_NAMES.get(expected, expected.__name__)
        raise NanoVLMError(f"{where} is {value!r}, expected {wanted}")
    return read


def check_numbers(part: Any) -> None:
    """Refuse a config with a number below 0, or with 0 where that is not the default."""
    name = type(part).__name__
    if getattr(part, "num_hidden_layers", 0) > MAX_LAYERS:
        raise NanoVLMError(
            f"{name}: num_hidden_layers is {part.num_hidden_layers}; "
            f"it has to be at most {MAX_LAYERS}"
        )
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if type(value) in (int, float) and (value < 0 or (value == 0 and field.default != 0)):
            raise NanoVLMError(f"{name}: {field.name} is {value}; it has to be above 0")


def check_choices(part: Any, choices: Mapping[str, Collection[str]]) -> None:
    """Refuse a config in which a field that `choices` names has none of the values given there."""
    for name, known in choices.items():
        if getattr(part, name) not in known:
            raise NanoVLMError(
                f"{type(part).__name__}: {name} is {getattr(part, name)!r}; "
                f"take one of {', '.join(known)}"
            )


def check_divides(part: Any, multiple: str, divisor: str) -> None:
    """Refuse a config in which the field `multiple` is not a multiple of the field `divisor`."""
    if getattr(part, multiple) % getattr(part, divisor):
        raise NanoVLMError(
            f"{type(part).__name__}: {multiple} = {getattr(part, multiple)} is not a multiple of "
            f"{divisor} = {getattr(part, divisor)}"
        )


def check(condition: bool, problem: str, where: str) -> None:
    """Raise `where: problem` unless `condition` holds."""
    if not condition:
        raise NanoVLMError(f"{where}: {problem}")
