"""Reading training and evaluation records, in LLaVA's form or as messages, and saying which ones cannot be used.

    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\n…"}, {"from": "gpt", "value": "…"}]}
    {"images": ["a.jpg", "b.jpg"], "messages": [{"role": "user", "content": "<image> <image> …"}, …]}
    {"image": "a.jpg", "messages": [{"role": "user", "content": "<image>\\n…"}], "references": ["…", "…"]}

`image` and `images` may be missing, one path or a list. A record with `references` ends with its question, which any of
the references answers; it is for evaluation.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovlm.chat import IMAGE_MARKER, Message
from nanovlm.errors import NanoVLMError

LLAVA_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
MAX_SKIPPED = 0.01  # share of unusable records above which a run stops: beyond stray damage, something is wrong
MAX_NAMED = 50  # of the reasons listed when it does


@dataclass(frozen=True)
class Record:
    """One sample. `where` names it in messages: the file and the line, or the place in the list."""

    where: str
    images: tuple[Path, ...]
    messages: tuple[Message, ...]
    references: tuple[str, ...]
    source: dict[str, Any]  # as it was written, for what only some readers need


def read_records(path: str | Path, images: str | Path | None = None) -> tuple[list[Record], list[str]]:
    """All usable records of a `.json` or `.jsonl` file, and a line for each one skipped.

    Image paths are relative to `images`, by default the file's own folder. An empty file is an error, and so are more
    unusable records than `check_skipped` lets pass.
    """
    path = Path(path)
    folder = path.parent if images is None else Path(images)
    if not folder.is_dir():
        raise NanoVLMError(f"{folder}: is not a folder; say with --images where the images are")
    records, skipped, total = [], [], 0
    for where, entry in _entries(path):
        total += 1
        try:
            records.append(parse_record(entry, where, folder))
        except NanoVLMError as error:
            skipped.append(str(error))
    if total == 0:
        raise NanoVLMError(f"{path}: holds no records")
    check_skipped(skipped, total)
    return records, skipped


def check_skipped(skipped: Sequence[str], total: int) -> None:
    """Stop when more than MAX_SKIPPED of all records cannot be used, naming them."""
    if len(skipped) > MAX_SKIPPED * total:
        lines = [f"  {reason}" for reason in skipped[:MAX_NAMED]]
        lines += [f"  … and {len(skipped) - MAX_NAMED} more"] if len(skipped) > MAX_NAMED else []
        raise NanoVLMError(f"{len(skipped)} of {total} records cannot be used, more than {MAX_SKIPPED:.0%}; "
                           "mend or remove them:\n" + "\n".join(lines))


def parse_record(entry: Any, where: str, folder: Path) -> Record:
    """Check one record and resolve its image paths; raises with `where` and the reason."""
    def fail(reason: str) -> NanoVLMError:
        return NanoVLMError(f"{where}: {reason}")

    if not isinstance(entry, dict):
        raise fail(f"is a JSON {type(entry).__name__}, expected an object")
    names = entry.get("images", entry.get("image")) or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise fail("image is not a path or a list of paths")
    images = tuple(folder / name for name in names)
    if missing := [image for image in images if not os.path.isfile(image)]:  # of any length, unlike pathlib's
        raise fail(f"image {missing[0]} does not exist")
    try:
        messages = tuple(_messages(entry))
    except NanoVLMError as error:
        raise fail(str(error)) from None
    places = sum(message.num_images for message in messages)
    if places != len(images):
        raise fail(f"the text has {places} {IMAGE_MARKER} markers and the record {len(images)} images")
    references = entry.get("references", [])
    if not isinstance(references, list) or not all(isinstance(reference, str) for reference in references):
        raise fail("references is not a list of texts")
    if messages[-1].role != ("user" if references else "assistant"):
        raise fail("the last turn is not the assistant's" if not references else
                   "a record with references has to end with the user's question")
    return Record(where, images, messages, tuple(references), entry)


def _messages(entry: dict[str, Any]) -> Iterator[Message]:
    llava = "messages" not in entry
    turns = entry.get("conversations") if llava else entry["messages"]
    role_key, text_key = ("from", "value") if llava else ("role", "content")
    if not isinstance(turns, list) or not turns:
        raise NanoVLMError("has neither messages nor conversations with a turn in it")
    for turn in turns:
        role, text = (turn.get(role_key), turn.get(text_key)) if isinstance(turn, dict) else (None, None)
        role = LLAVA_ROLES.get(role, role) if llava else role
        if role not in ("system", "user", "assistant"):
            raise NanoVLMError(f"a turn has {role_key} = {role!r}, expected {'human or gpt' if llava else 'user or assistant'}")
        if not isinstance(text, str) or not text.strip():
            raise NanoVLMError(f"a {role} turn has no text in {text_key!r}")
        yield Message.parse(role, text)


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each record stands and what JSON says of it; a broken line comes as text, to be counted and named."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise NanoVLMError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise NanoVLMError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"{path}:{number}", _parse_json(line)
        return
    entries = _parse_json(text) if text.strip() else []
    if not isinstance(entries, list):
        raise NanoVLMError(f"{path}: is not a JSON list of records; name a file with one record a line .jsonl")
    for number, entry in enumerate(entries, start=1):
        yield f"{path}: record {number}", entry


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # a str where an object is expected: reported as such, with its place
