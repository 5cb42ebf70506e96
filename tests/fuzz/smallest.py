"""A failing input made smaller, as long as it fails for the same reason."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from tests.fuzz.inputs import Content, Input

TRIES = 400
SECONDS = 20


def smallest(input: Input, fails: Callable[[Input], bool]) -> Input:
    """Take parts away, the largest first, until none can go; at most TRIES, or for SECONDS."""
    tries, end = TRIES, time.monotonic() + SECONDS
    while True:
        for smaller in _smaller(input):
            tries -= 1
            if tries < 0 or time.monotonic() > end:
                return input
            if fails(smaller):
                input = smaller
                break
        else:
            return input


def _smaller(input: Input) -> Iterator[Input]:
    for name in input.files:
        yield replace(input, files={key: input.files[key] for key in input.files if key != name})
    for place in range(len(input.arguments)):
        rest = input.arguments[:place] + input.arguments[place + 1 :]
        yield replace(input, arguments=rest)
    for name, content in input.files.items():
        for shorter in _shorter(content):
            yield input.with_file(name, shorter)


def _shorter(content: Content) -> Iterator[bytes]:
    if not isinstance(content, bytes):
        return
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, (dict, list)):
        yield from (json.dumps(smaller).encode() for smaller in _smaller_values(value))
        return
    lines = content.splitlines(keepends=True)
    if len(lines) > 2 and b"\0" not in content:
        yield from map(b"".join, _without_parts(lines))
    yield from map(bytes, _without_parts(content))


def _smaller_values(value: Any) -> Iterator[Any]:
    """A JSON value without one of its parts, at all depths, the upper ones first."""
    if isinstance(value, dict):
        for key in value:
            yield {other: value[other] for other in value if other != key}
        for key in value:
            yield from ({**value, key: smaller} for smaller in _smaller_values(value[key]))
    elif isinstance(value, list):
        yield from _without_parts(value)
        for place, item in enumerate(value):
            for smaller in _smaller_values(item):
                yield [*value[:place], smaller, *value[place + 1 :]]
    elif isinstance(value, str) and len(value) > 8:
        yield from _without_parts(value)


def _without_parts(sequence: Any) -> Iterator[Any]:
    """A list, text or bytes without each half, each quarter, and so on."""
    size = len(sequence) // 2
    while size:
        for start in range(0, len(sequence), size):
            yield sequence[:start] + sequence[start + size :]
        size //= 2
    if len(sequence) == 1:
        yield sequence[:0]
