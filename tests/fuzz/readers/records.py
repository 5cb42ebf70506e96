"""Files of records and of pairs, in all forms: one bad record never ends a run."""

import base64
import dataclasses
import json
import re
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from nanovlm.data.batches import Batches, BatchOptions, RecordEncoder
from nanovlm.data.preferences import PairEncoder, read_pairs
from nanovlm.data.records import Record, read_records
from nanovlm.errors import NanoVLMError
from nanovlm.hub.models import load_model
from nanovlm.inputs.image_config import ImageConfig
from tests.fuzz.commands.toy import SCENE, SHIPPED
from tests.fuzz.damage import (
    DEEP,
    DIGITS,
    damaged_bytes,
    damaged_file,
    damaged_text,
    damaged_value,
    to_json,
)
from tests.fuzz.inputs import FaultError, Input, Kind

WHOLE = 200  # good records, of which one bad one is less than 1 %
OPTIONS = BatchOptions(batch_size=1, max_length=1024, shuffle=False)
QUESTION, ANSWER = "<image>\n图里有什么？", "A red circle."
TURNS = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
PARTS = [{"type": "image"}, {"type": "text", "text": "图里有什么？"}]
FORMS: tuple[dict[str, Any], ...] = (
    {"image": "a.png", "messages": TURNS},
    {"images": ["a.png"], "messages": TURNS, "system": "Be brief.", "id": 3},
    {"image": "a.png", "conversations": [
        {"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
    {"messages": [{"role": "system", "content": "Be brief."}, *TURNS], "image": ["a.png"]},
    {"image": "a.png", "messages": TURNS[:1], "references": [ANSWER, "A circle."]},
    {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}],
     "image": None},
    {"messages": [{"role": "user", "content": PARTS}, TURNS[1]], "images": ["a.png"]},
    {"messages": [
        {"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "?"}]},
        TURNS[1]]},
    {"messages": [*TURNS, {"role": "user", "content": "Sure?"},
                  {"role": "assistant", "content": "Yes.", "loss": False, "weight": 0}],
     "image": "a.png"},
    {"conversations": [{"from": "user", "value": "Picture 1: <img>a.png</img>\nWhat?"},
                       {"from": "assistant", "value": ANSWER}]},
    {"instruction": QUESTION, "input": "", "output": ANSWER, "images": ["a.png"]},
    {"image": f"data:image/png;base64,{base64.b64encode(SCENE).decode()}", "messages": TURNS},
    {"image": "d\\a.png", "messages": TURNS, "kind": "describe"},
    {"query": QUESTION, "response": ANSWER, "images": ["a.png"], "history": [["a", "b"]]},
)  # fmt: skip
PAIRS: tuple[dict[str, Any], ...] = (
    {"image": "a.png", "prompt": "描述图片", "chosen": ANSWER, "rejected": "A square."},
    {"image": "a.png", "messages": TURNS[:1], "chosen": ANSWER, "rejected": "A square."},
    {"conversations": [{"from": "human", "value": QUESTION}], "image": "a.png",
     "chosen": {"from": "gpt", "value": ANSWER}, "rejected": {"from": "gpt", "value": "A square."}},
)  # fmt: skip


@cache
def _encoder() -> RecordEncoder:
    encoder = RecordEncoder.of(load_model(SHIPPED))
    return dataclasses.replace(encoder, image=ImageConfig(16, 16))


def make(rng: Random) -> Input:
    """One damaged record, to be read among good ones, or a file damaged as a whole."""
    what = rng.choice(("records", "records", "records", "pairs"))
    form = rng.choice(PAIRS if what == "pairs" else FORMS)
    spoiled = to_json(damaged_value(rng, form))
    if rng.random() < 0.7:
        # Python reads no number of thousands of digits, and no lists so deep, in a whole list.
        unreadable = any(to_json(value) in spoiled for value in (DEEP, DIGITS))
        name = rng.choice(("one.jsonl", "one.jsonl" if unreadable else "one.json"))
        if name == "one.jsonl" and rng.random() < 0.3:
            spoiled = _damaged_line(rng, form)
        return Input({name: spoiled, "a.png": SCENE, "d/a.png": SCENE}, (what,))
    name, lines = rng.choice(("a.json", "a.jsonl")), [to_json(form), spoiled]
    data = damaged_file(rng, _file(lines, name), lambda: _file(lines, name))
    return Input({name: data, "a.png": SCENE, "d/a.png": SCENE}, (what,))


def _damaged_line(rng: Random, record: dict[str, Any]) -> bytes:
    """A record whose text is damaged, still on one line."""
    text = json.dumps(record, ensure_ascii=False)
    line = rng.choice(
        (damaged_text(rng, text).encode("utf-8", "replace"), damaged_bytes(rng, text.encode()))
    )
    return line.replace(b"\n", b" ")


def _file(lines: list[bytes], name: str) -> bytes:
    is_list = name.endswith(".json")
    return b"[" + b",\n".join(lines) + b"]" if is_list else b"\n".join(lines) + b"\n"


def read(input: Input) -> None:
    """Read the records, and batch those that are not all alike."""
    what = input.arguments[0]
    read_all, forms = (read_pairs, PAIRS) if what == "pairs" else (read_records, FORMS)
    data = next(name for name in input.files if name.endswith((".json", ".jsonl")))
    if not data.startswith("one"):
        records, _ = read_all(data)
    else:
        good = [to_json(forms[0])] * (WHOLE // 2)
        spoiled = Path(data).read_bytes()
        Path(f".{data}").write_bytes(_file([*good, spoiled, *good], data))
        try:
            records, skipped = read_all(f".{data}")
        except Exception as error:
            raise FaultError(f"one bad record ends a run: {_words(error)}") from error
        if len(records) + len(skipped) not in (WHOLE, WHOLE + 1):  # an empty line is none
            raise FaultError("a record is neither read nor named")
    seen = []
    for record in records:
        if not any(record.messages == other.messages for other in seen):
            seen.append(record)
    encoder = PairEncoder(_encoder()) if what == "pairs" else _encoder()
    for loaded in Batches(seen, encoder, OPTIONS).loader(0, len(seen)):
        if loaded.batch is None and not loaded.skipped:
            raise FaultError("a record is left out and not named")
    for record in seen:
        _check_special_tokens(record)


def _check_special_tokens(record: Record) -> None:
    """Those of a record come from its turns and its images, and never from its text."""
    encoder = _encoder()
    try:
        sequence, is_cut = encoder.encode(record, OPTIONS)
    except NanoVLMError:
        return
    tokenizer = encoder.chat.tokenizer
    special = set(tokenizer.special_tokens.values()) - {tokenizer.special_tokens["<unk>"]}
    found = sum(id in special for id in sequence.input_ids)
    if not is_cut and found != 2 * len(record.messages) + encoder.image_length * len(record.images):
        raise FaultError("a text gives a special token, or an image is lost")


def _words(error: Exception) -> str:
    """What an error says, without what differs between alike ones."""
    return re.sub(r"\W*\w*\d\w*|'.*'", "", str(error).partition("\n")[0])[:80]


KIND = Kind("records", make, read, short=40, long=1300)
