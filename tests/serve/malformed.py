"""Requests that are wrong in ways drawn from a seed."""

import base64
import json
import random

from tests.serve.serving import data_uri, image_part, question, uri_of

MALFORMED = 500


def malformed(number: int) -> bytes:
    """A request that is wrong in a way drawn by `number`."""
    draw = random.Random(number)
    good = question(draw.choice(["描述图片", "How many objects are there?"]))
    kind = draw.randrange(6)
    body = json.dumps(good).encode()
    if kind == 0:  # cut off
        body = body[: draw.randrange(len(body) - 1)]
    elif kind == 1:  # bytes turned around
        changed = bytearray(body)
        for _ in range(draw.randrange(1, 40)):
            changed[draw.randrange(60)] = draw.randrange(256)
        body = bytes(changed)
    elif kind == 2:  # nested, long or strange JSON
        body = draw.choice(
            [
                b"[" * 10**5,
                b'{"a":' * 5000,
                b"1" * 5000,
                b"null",
                b"[]",
                b'"text"',
                b"\xff\xfe\x00",
                b'{"messages": NaN, "model": Infinity}',
            ]
        )
    elif kind == 3:  # a value of another type somewhere
        strange = draw.choice([-1, 1.5, "x", [], {}, [[]], True, 10**400, "\ud800", {"a": 1}])
        place, key = draw.choice(
            [
                (good, "messages"),
                (good, "model"),
                (good, "temperature"),
                (good, "seed"),
                (good, "max_tokens"),
                (good, "stream_options"),
                (good["messages"][0], "role"),
                (good["messages"][0], "content"),
                (good["messages"][0]["content"][1], "image_url"),
                (good["messages"][0]["content"][1]["image_url"], "url"),
            ]
        )
        place[key] = strange
        if key in ("temperature", "seed", "max_tokens") and strange in (1.5, -1, True):
            place[key] = "no"
        if key == "content" and strange in ("x", []):
            place[key] = 5
        if key == "stream_options" and strange in ({}, {"a": 1}):
            place[key] = 5
        body = json.dumps(good).encode()
    elif kind == 4:  # a damaged image
        data = bytearray(base64.b64decode(data_uri().partition(",")[2]))
        data = data[: draw.randrange(8, 60)]
        body = json.dumps(question("?", image_part(uri_of(bytes(data))))).encode()
    else:  # an unknown parameter
        good["x" * draw.randrange(1, 300)] = 1
        body = json.dumps(good).encode()
    return body
