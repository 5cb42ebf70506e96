"""Read records for training and evaluation, and name those that cannot be used.

They are in LLaVA's form or messages:

    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\n…"},
                                         {"from": "gpt", "value": "…"}]}
    {"images": ["a.jpg", "b.jpg"], "messages": [{"role": "user", "content": "<image> <image> …"},
                                                {"role": "assistant", "content": "…"}]}
    {"image": "a.jpg", "messages": [{"role": "user", "content": "<image>\\n…"}],
     "references": ["…", "…"]}

`image` and `images` may be missing, one path or a list; a path may lead into a tar file,
`images.tar::a.jpg`. A record with `references` ends with a question, to which each of them is a
right answer; it is for evaluation.
"""

import codecs
import glob
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovlm.errors import NanoVLMError
from nanovlm.inputs import archive
from nanovlm.inputs.chat import IMAGE_MARKER, ROLES, Message

LLAVA_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
READ = ("image", "images", "conversations", "messages", "references")  # others become `extra`
MAX_SKIPPED = 0.01  # share of unusable records above which a run stops
MAX_NAMED = 50  # how many of them are listed then


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a data file: a conversation and its images."""

    where: str  # its name in messages: the file and the line, or the place in the list
    images: tuple[Path, ...]
    messages: tuple[Message, ...]
    references: tuple[str, ...]
    extra: dict[str, Any]  # its other keys, such as `kind`
    rejected: str = ""  # the worse answer of a pair, whose `messages` end with the better one


def read_records(
    data: str | Path,
    images: str | Path | None = None,
    parse: Callable[[Any, str, Path], Record] | None = None,
) -> tuple[list[Record], list[str]]:
    """All usable records of the `record_files` that `data` names, and a line for each one skipped.

    Image paths are relative to `images`, by default the file's own folder. An empty file is an
    error, and so are more unusable records than `check_skipped` lets pass. `parse` reads records of
    another form than `parse_record` does.
    """
    records, skipped = [], []
    for path in record_files(data):
        folder = path.parent if images is None else Path(images)
        before = len(records) + len(skipped)
        if not folder.is_dir():
            raise NanoVLMError(f"{folder}: is not a folder; say with --images where the images are")
        for where, entry in read_entries(path):
            try:
                records.append((parse or parse_record)(entry, where, folder))
            except NanoVLMError as error:
                skipped.append(str(error))
        if len(records) + len(skipped) == before:
            raise NanoVLMError(f"{path}: holds no records")
    check_skipped(skipped, len(records) + len(skipped))
    return records, skipped


def record_files(data: str | Path) -> list[Path]:
    """The files that `data` names, sorted: one, several with commas, or a pattern (`*.jsonl`)."""
    if Path(data).exists():
        return [Path(data)]
    files: set[Path] = set()
    for name in (name.strip() for name in str(data).split(",")):
        is_pattern = glob.has_magic(name) and not Path(name).exists()
        found = glob.glob(name, recursive=True) if is_pattern else [name]
        if not found:
            raise NanoVLMError(
                f"{name}: no file matches this pattern; check it, and put it in quotes"
            )
        files |= set(map(Path, found))
    return sorted(files)


def check_skipped(skipped: Sequence[str], total: int) -> None:
    """Raise if more than MAX_SKIPPED of all records cannot be used, with the reasons."""
    if len(skipped) > MAX_SKIPPED * total:
        lines = [f"  {reason}" for reason in skipped[:MAX_NAMED]]
        lines += [f"  … and {len(skipped) - MAX_NAMED} more"] if len(skipped) > MAX_NAMED else []
        raise NanoVLMError(
            f"{len(skipped)} of {total} records cannot be used, more than {MAX_SKIPPED:.0%}; "
            "mend or remove them:",
            *lines,
        )


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
    for image in images:
        try:
            archive.check(image)
        except NanoVLMError as error:
            raise fail(f"image {image} {error}") from None
    try:
        messages = tuple(_messages(entry))
    except NanoVLMError as error:
        raise fail(str(error)) from None
    places = sum(message.num_images for message in messages)
    if places != len(images):
        raise fail(
            f"the text has {places} {IMAGE_MARKER} markers and the record {len(images)} images"
        )
    references = entry.get("references", [])
    if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
        raise fail("references is not a list of texts")
    if references and messages[-1].role != "user":
        raise fail("a record with references has to end with the user's question")
    if not references and messages[-1].role != "assistant":
        raise fail("the last turn is not the assistant's")
    extra = {key: value for key, value in entry.items() if key not in READ}
    return Record(where, images, messages, tuple(references), extra)


def _messages(entry: dict[str, Any]) -> Iterator[Message]:
    llava = "messages" not in entry
    turns = entry.get("conversations") if llava else entry["messages"]
    role_key, text_key = ("from", "value") if llava else ("role", "content")
    if not isinstance(turns, list) or not turns:
        raise NanoVLMError("has neither messages nor conversations with a turn in it")
    for turn in turns:
        turn = turn if isinstance(turn, dict) else {}
        role, text = turn.get(role_key), turn.get(text_key)
        role = LLAVA_ROLES.get(role, role) if llava and isinstance(role, str) else role
        if role not in ROLES:
            expected = "human or gpt" if llava else "user or assistant"
            raise NanoVLMError(f"a turn has {role_key} = {role!r}, expected {expected}")
        if not isinstance(text, str) or not text.strip():
            raise NanoVLMError(f"a {role} turn has no text in {text_key!r}")
        yield Message.parse(role, text)


def read_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """The place of each record and its parsed JSON; of a broken line its text, to be reported."""
    lines = _lines(path)
    if path.suffix == ".jsonl":
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", _parse_json(line)
        return
    text = "".join(lines)
    entries = _parse_json(text) if text.strip() else []
    if not isinstance(entries, list):
        raise NanoVLMError(
            f"{path}: is not a JSON list of records; name a file with one record a line .jsonl"
        )
    for number, entry in enumerate(entries, start=1):
        yield f"{path}: record {number}", entry


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file, one at a time: that of a million records is never held whole."""
    start = 0
    try:
        with open(path, "rb") as file:
            for line in file:  # as bytes, because in text more than a line feed ends a line
                yield (line.removeprefix(codecs.BOM_UTF8) if start == 0 else line).decode()
                start += len(line)
    except OSError as error:
        raise NanoVLMError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise NanoVLMError(
            f"{path}: is not UTF-8 text (byte {start + error.start}); save it as UTF-8"
        ) from None


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # reported by `parse_record` as a str where an object is expected
