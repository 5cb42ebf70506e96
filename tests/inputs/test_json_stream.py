"""JSON files larger than memory: the same values as json.loads, wherever the text is cut."""

import io
import json
from pathlib import Path

import pytest

from nanovlm.errors import NanoVLMError
from nanovlm.inputs import json_stream
from nanovlm.inputs.json_stream import stream_json

PATH = Path("data.json")
ITEMS = [
    {"a": '图\n\\"é', "b": [1, -2.5e3, None, True], "c": {}},
    [],
    "x" * 50,
    12345678901234567890,
    0.25,
    False,
    {"deep": [[[["𝄞"]]]]},
]


def read(text: str | bytes) -> list:
    return list(stream_json(PATH, io.BytesIO(text.encode() if isinstance(text, str) else text)))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 2**20])
@pytest.mark.parametrize("indent", [None, 2])
def test_items_are_those_of_json_loads(monkeypatch, chunk: int, indent: int | None):
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    text = json.dumps(ITEMS, ensure_ascii=False, indent=indent)
    assert read(text) == [(None, item) for item in ITEMS]
    assert read(b"\xef\xbb\xbf " + text.encode() + b"\r\n ") == [(None, item) for item in ITEMS]


@pytest.mark.parametrize("chunk", [1, 5, 2**20])
def test_of_an_object_lists_come_item_by_item(monkeypatch, chunk: int):
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    value = {"info": {"year": 2014}, "images": [{"id": 1}, {"id": 2}], "none": [], "n": 3}
    expected = [("info", {"year": 2014}), ("images", {"id": 1}), ("images", {"id": 2}), ("n", 3)]
    assert read(json.dumps(value)) == expected
    assert read("{}") == read("[]") == []


@pytest.mark.parametrize(
    "text, place",
    [
        ('[{"a": 1}\n {}]', "2:2: is not valid JSON (Expecting ',' delimiter)"),
        ('[{"a": 1},\n]', "2:1: is not valid JSON (Expecting value)"),
        ("[1, 2\n", "2:1: is not valid JSON (Expecting ',' delimiter)"),
        ('[1, "never closed', "1:5: is not valid JSON (Unterminated string"),
        ("[1] 2", "1:5: is not valid JSON (Extra data)"),
        ('{"a" 1}', "1:6: is not valid JSON (Expecting ':')"),
        ("{1: 2}", "1:2: is not valid JSON (Expecting property name"),
        ('[tru, {"a": "' + "x" * 99 + '"}]', "1:2: is not valid JSON (Expecting value)"),
        ("3", "1:1: is not valid JSON (Expecting '[')"),
        ("[" + "9" * 5000 + "]", "has a number or a nesting without end"),
        ("[" * 99_999, "has a number or a nesting without end"),
    ],
)
@pytest.mark.parametrize("chunk", [4, 2**20])
def test_damage_is_named_with_its_place(monkeypatch, text: str, place: str, chunk: int):
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    with pytest.raises(NanoVLMError) as raised:
        read(text)
    assert str(raised.value).startswith("data.json:") and place in str(raised.value)


def test_what_comes_before_the_damage_has_been_given():
    items = []
    with pytest.raises(NanoVLMError, match="2:3"):
        for item in stream_json(PATH, io.BytesIO(b"[1, 2,\n  x]")):
            items.append(item)
    assert items == [(None, 1), (None, 2)]


def test_only_one_item_is_held(monkeypatch):
    """Of 200 items of 10 kB, no more than some are read before the first is given."""
    monkeypatch.setattr(json_stream, "CHUNK", 2**10)
    file = io.BytesIO(json.dumps(["x" * 10_000] * 200).encode())
    items = stream_json(PATH, file)
    next(items)
    assert file.tell() < 40_000
    assert len(list(items)) == 199


def test_an_item_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(json_stream, "CHUNK", 2**10)
    monkeypatch.setattr(json_stream, "MAX_ITEM", 2**12)
    with pytest.raises(NanoVLMError, match="an item of more than"):
        read('["' + "x" * 2**16)


def test_bytes_that_are_no_utf_8_become_lone_surrogates():
    assert read(b'["\xff"]') == [(None, "\udcff")]
