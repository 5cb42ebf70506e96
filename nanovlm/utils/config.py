"""Reading settings strictly: an unknown key or a value of the wrong type is an error."""

import dataclasses
import difflib
import math
import types
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Protocol, TypeVar

from nanovlm.errors import NanoVLMError, quoted


class Dataclass(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


T = TypeVar("T", bound=Dataclass)

# The smallest and the largest value of a number in a config or a flag, by its name: beyond what
# any published model has, so that a damaged number is refused before it fills the memory. Of each
# group, the first name is ours; the others are those of published files.
LIMITS: dict[str, tuple[float, float]] = {
    name: limits
    for names, limits in (
        ("hidden_size embedding_size reducer_size output_size output_dim", (1, 2**16)),
        ("intermediate_size", (1, 2**19)),
        ("num_hidden_layers layers language_model_layers vision_encoder_layers", (1, 1000)),
        ("num_attention_heads num_key_value_heads num_heads heads", (1, 1024)),
        ("head_dim kv_channels", (1, 4096)),
        ("vocab_size token_id", (1, 2**22)),
        ("max_position_embeddings original_max_position_embeddings seq_length", (1, 2**26)),
        ("rms_norm_eps layer_norm_eps layer_norm_epsilon", (1e-12, 0.1)),
        ("rope_theta rotary_emb_base", (1, 1e12)),
        ("rope_factor rope_low_freq_factor rope_high_freq_factor", (0.01, 10_000)),
        ("num_experts", (1, 4096)),
        ("experts_per_token num_shared_experts", (1, 64)),
        ("mlp_ratio", (0.01, 64)),
        ("image_size", (1, 2**14)),  # pixels, as the next two lines
        ("height width shortest_edge", (1, 8192)),  # `width` is also the hidden size of Qwen-VL's
        ("patch_size", (1, 1024)),
        ("patch_positions", (1, 2**20)),
        ("num_register_tokens grid", (1, 1024)),
        ("num_queries n_queries", (1, 2**14)),
        ("scale max_tiles tiles", (1, 64)),
        ("dropout warmup min_lr val_fraction beta2 lora_dropout label_smoothing", (0, 1)),
        ("rank lora_rank", (1, 4096)),
        ("layer_decay", (1e-3, 10)),
        ("vision_layer vision_feature_layer", (-1000, 1000)),
        ("vision_first_token", (0, 1024)),
        ("workers", (0, 256)),
        # Of sampling: within these, logits stay finite in fp32.
        ("temperature", (1e-6, 1e6)),
        ("repetition_penalty", (1e-3, 1e3)),
        ("top_p", (1e-6, 1)),
        ("beams", (1, 256)),
        ("length_penalty", (-4, 4)),
        ("seed", (-(2**63), 2**63 - 1)),
    )
    for name in names.split()
}
SMALLEST = 1e-12  # fraction above 0: what is far below is 0 in fp32, though not here
OTHER_LIMITS = {int: (1, 2**31 - 1), float: (SMALLEST, 1e12)}
MAX_EXPERTS = 4096  # in all layers together: building so many modules takes seconds
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


def unknown_key(
    key: str, known: Collection[str], where: str, advice: str = "remove it"
) -> NanoVLMError:
    """The error for an unknown key, naming its new name or the nearest key that exists.

    `advice` is for a key to which none is near.
    """
    if RENAMED.get(key) in known:
        return NanoVLMError(f"{where}: key {key!r} is now {RENAMED[key]!r}; rename it")
    # A key of many thousand letters is near to nothing, and comparing it would take hours.
    near = difflib.get_close_matches(key[:100], list(known), n=1, cutoff=0.5)
    advice = f"did you mean {near[0]!r}?" if near else advice
    return NanoVLMError(f"{where}: unknown key {quoted(key)}; {advice}")


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
    """The value as a field of type `expected` holds it."""
    if dataclasses.is_dataclass(expected):
        return from_dict(expected, value)  # pyright: ignore[reportArgumentType]
    if isinstance(expected, types.GenericAlias):  # such as `tuple[float, float, float]`
        member = expected.__args__[0]
        if isinstance(value, list | tuple) and all(_is_a(member, item) for item in value):
            return tuple(value)
        wanted = f"a list, each {TYPE_NAMES[member]}"
    else:
        union = isinstance(expected, types.UnionType)  # such as `str | None`
        members = expected.__args__ if union else (expected,)
        if any(_is_a(member, value) for member in members):
            return value
        wanted = " or ".join(TYPE_NAMES.get(member, "null") for member in members)
    raise NanoVLMError(f"{where} is {quoted(value)}, expected {wanted}")


def _is_a(expected: type, value: Any) -> bool:
    """Whole numbers stand in for fractions; true and false are no numbers."""
    if isinstance(value, bool):
        return expected is bool
    return isinstance(value, (int, float) if expected is float else expected)


def check_numbers(part: Any) -> None:
    """Refuse a config in which a number is none, not finite, or not within its LIMITS.

    0 is allowed where it is the default, or within the limits.
    """
    for field in dataclasses.fields(part):
        value, where = getattr(part, field.name), f"{type(part).__name__}: {field.name}"
        if field.type in (int, float, int | None):
            _read_value(value, field.type, where)
            check_number(field.name, value, where, field.default)


def check_number(name: str, value: Any, where: str, default: Any = 1) -> None:
    """Refuse a number that is not finite or not within the LIMITS of `name`.

    Nothing that is not a number is looked at. 0 is allowed where `default` is 0 as well. `where`
    begins the message.
    """
    if type(value) not in (int, float) or value == default == 0:
        return
    kind = float if isinstance(value, float) else int
    low, high = LIMITS[name] if name in LIMITS else OTHER_LIMITS[kind]
    if low <= value <= high and not 0 < value < SMALLEST:  # never of NaN
        return
    if isinstance(value, float) and not math.isfinite(value):
        request = "a finite number"
    elif low <= value <= high:
        request = f"0, or at least {SMALLEST}"
    elif not low:
        request = f"between 0 and {high}"
    elif value > high:
        request = f"at most {high:g}" if isinstance(high, float) else f"at most {high}"
    elif value > 0:
        request = f"at least {low}"
    else:
        request = f"{min(low, 0)} or more" if default == 0 or low < 0 else "above 0"
    raise NanoVLMError(f"{where} is {quoted(value)}; it has to be {request}")


def check_choices(part: Any, choices: Mapping[str, Collection[str]]) -> None:
    """Refuse a config in which a field that `choices` names has none of the values given there."""
    for name, known in choices.items():
        if getattr(part, name) not in known:
            raise NanoVLMError(
                f"{type(part).__name__}: {name} is {quoted(getattr(part, name))}; "
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
