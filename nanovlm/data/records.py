"""Read records for training and evaluation, and name those that cannot be used.

Their conversations are in one of the published forms (`nanovlm.data.forms`), for example:

    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\n…"},
                                         {"from": "gpt", "value": "…"}]}
    {"images": ["a.jpg", "b.jpg"], "messages": [{"role": "user", "content": "<image> <image> …"},
                                                {"role": "assistant", "content": "…"}]}
    {"image": "a.jpg", "messages": [{"role": "user", "content": "<image>\\n…"}],
     "references": ["…", "…"]}

An image is a path, which may lead into a tar file, `images.tar::a.jpg`, or a `data:` URI. A record
with `references` ends with a question, to which each of them is a right answer; it is for
evaluation.
"""

import argparse
import codecs
import glob
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

from nanovlm.data.forms import READ, present, read_conversation
from nanovlm.errors import MAX_QUOTED, NanoVLMError, quoted, see
from nanovlm.inputs import archive, data_uri
from nanovlm.inputs.chat import IMAGE_MARKER, Message
from nanovlm.inputs.image import open_image
from nanovlm.inputs.json_stream import stream_json
from nanovlm.utils.console import say
from nanovlm.utils.files import open_regular
from nanovlm.utils.parser import expand_user
from nanovlm.utils.sniff import FIRST_BYTES, what_is

MAX_SKIPPED = 0.01  # share of unusable records above which a run stops
MAX_NAMED = 50  # how many of them are listed then
MAX_LINE = 2**26  # bytes of a line of .jsonl: a record with its image in base64

# Where images are: the folder that their paths are relative to, or what finds each by its name and
# raises NanoVLMError.
Images = Path | Callable[[str], Path]


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a data file: a conversation and its images."""

    where: str  # its name in messages: the file and the line, or the place in the list
    images: tuple[Path, ...]
    messages: tuple[Message, ...]
    references: tuple[str, ...]
    extra: dict[str, Any]  # its other keys, such as `kind`
    rejected: str = ""  # the worse answer of a pair, whose `messages` end with the better one

    def to_entry(self, images: Sequence[str]) -> dict[str, Any]:
        """The record as a JSON object with chat messages and these names for its images."""
        turns = []
        for message in self.messages:
            parts = (part if isinstance(part, str) else IMAGE_MARKER for part in message.content)
            turn: dict[str, Any] = {"role": message.role, "content": "".join(parts)}
            turns.append(turn if message.labelled else {**turn, "loss": False})
        entry = {**self.extra, "images": list(images), "messages": turns}
        if self.rejected:
            answer = {"chosen": self.messages[-1].text, "rejected": self.rejected}
            entry |= {"messages": turns[:-1], **answer}
        return {**entry, "references": list(self.references)} if self.references else entry


def add_records_flags(parser: argparse._ActionsContainer) -> None:
    """Give a parser `--data` and `--images`, for `read_records`."""
    parser.add_argument(
        "--data",
        type=expand_user,
        required=True,
        metavar="FILE",
        help="records, .json or .jsonl: a file, several with commas, or a pattern in quotes",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder of the images (default: the records' folder)",
    )


def read_records(
    data: str | Path,
    images: str | Path | None = None,
    parse: Callable[[Any, str, Images], Record] | None = None,
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
        return [_no_folder(Path(data))]
    files: set[Path] = set()
    for name in (name.strip() for name in str(data).split(",")):
        is_pattern = glob.has_magic(name) and not Path(name).exists()
        found = glob.glob(name, recursive=True) if is_pattern else [name]
        if not found:
            raise NanoVLMError(
                f"{name}: no file matches this pattern; check it, and put it in quotes"
            )
        files |= set(map(Path, found))
    return sorted(map(_no_folder, files))


def _no_folder(path: Path) -> Path:
    if not path.is_dir():
        return path
    records = path / "records.jsonl"  # as data_tools.convert names them
    advice = f"give its records, {records}"
    if not records.is_file():
        advice = "give a file of records; `python -m data_tools.convert` makes one of a data set"
    raise NanoVLMError(f"{path}: is a folder; {advice}")


def check_images(records: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """The records whose images can all be opened, and a line for each of the others."""
    usable, skipped = [], []
    for record in records:
        try:
            for path in record.images:
                open_image(path)
            usable.append(record)
        except NanoVLMError as error:
            skipped.append(f"{record.where}: {error}")
    return usable, skipped


def are_too_many(skipped: Sequence[str], total: int) -> bool:
    """Whether a run stops because so many of all records cannot be used.

    More than MAX_SKIPPED of them, but one by itself never stops a run that has others.
    """
    return len(skipped) > max(1, MAX_SKIPPED * total) or 0 < total == len(skipped)


def check_skipped(skipped: Sequence[str], total: int) -> None:
    """Raise if `are_too_many` records cannot be used, with the reasons."""
    if are_too_many(skipped, total):
        lines = [f"  {reason}" for reason in skipped[:MAX_NAMED]]
        lines += [f"  … and {len(skipped) - MAX_NAMED} more"] if len(skipped) > MAX_NAMED else []
        share = f", more than {MAX_SKIPPED:.0%}" if len(skipped) < total else ""
        raise NanoVLMError(
            f"{len(skipped)} of {total} records cannot be used{share}; mend or remove them "
            f"({see('skipped-records')}):",
            *lines,
        )


def say_skipped(skipped: Sequence[str], total: int) -> None:
    """Name the first MAX_NAMED of the skipped records, and say how many there are."""
    for reason in skipped[:MAX_NAMED]:
        say(f"skipped: {reason}")
    if skipped:
        first = "" if len(skipped) <= MAX_NAMED else f"the first {MAX_NAMED} of them "
        say(
            f"skipped: {len(skipped)} of {total} records, {first}named above; "
            f"{see('skipped-records')}"
        )


def parse_record(entry: Any, where: str, images: Images) -> Record:
    """Check one record and resolve its image paths; raises with `where` and the reason."""
    try:
        return _parse_record(entry, where, images)
    except NanoVLMError as error:
        raise NanoVLMError(f"{where}: {error}") from None


def _parse_record(entry: Any, where: str, places: Images) -> Record:
    if isinstance(entry, NanoVLMError):  # the reason why there is none
        raise entry
    if not isinstance(entry, dict):
        raise NanoVLMError(f"is a JSON {type(entry).__name__}, expected an object")
    messages, names = read_conversation(entry)
    find = places if callable(places) else partial(image_path, folder=places)
    images = tuple(map(find, names))
    references = present(entry).get("references", [])
    if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
        raise NanoVLMError("references is not a list of texts")
    if references and messages[-1].role != "user":
        raise NanoVLMError("a record with references has to end with the user's question")
    if not references and messages[-1].role != "assistant":
        raise NanoVLMError("the last turn is not the assistant's")
    extra = {key: value for key, value in entry.items() if key not in READ}
    return Record(where, images, messages, tuple(references), extra)


def image_path(name: str, folder: Path) -> Path:
    """Where an image is: an existing file, also in a tar file, or the record itself.

    Raises NanoVLMError with the image and the bare reason.
    """
    try:
        if data_uri.is_data_uri(name):
            return data_uri.to_path(name)
        scheme, separator, rest = name.partition("://")
        if scheme == "file":
            name = unquote(rest.removeprefix("localhost"))
        elif separator:
            raise NanoVLMError("is not on this machine; download it and write its path")
        if "\0" in name:
            raise NanoVLMError("has a NUL in its name")
        path = folder / name
        if "\\" in name and not os.path.lexists(path):  # written on Windows
            path = folder / name.replace("\\", "/")
        archive.check(path)
        return path
    except NanoVLMError as error:
        shown = str(folder / name)
        is_plain = shown.isprintable() and len(shown) <= MAX_QUOTED
        raise NanoVLMError(f"image {shown if is_plain else quoted(name)} {error}") from None


def read_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """The place of each record and its parsed JSON.

    In place of a record that is damaged comes a NanoVLMError with the reason.
    """
    with open_regular(path) as file:
        head = file.read(FIRST_BYTES).removeprefix(codecs.BOM_UTF8)
        start = head.lstrip()[:1]
        if start and start not in b"[{":
            what = what_is(head)
            if what not in (None, "JSON", "YAML", "TOML"):
                raise NanoVLMError(f"{path}: is {what}")
            if path.suffix not in (".jsonl", ".json"):  # else the first record alone is damaged
                raise NanoVLMError(
                    f"{path}: is {what or 'no JSON'}; records are JSON objects, one a line in a "
                    ".jsonl file or a list in a .json file"
                )
        first_line, _, rest = head.strip().partition(b"\n")
        if first_line.strip() == b"{" and rest:
            raise NanoVLMError(
                f"{path}: is a JSON object over several lines; write one record a line in a .jsonl "
                "file, or a list of them in a .json file"
            )
        file.seek(0)
        if first_line.strip() == b"[" or (start == b"[" and path.suffix != ".jsonl"):
            yield from _read_list(path, file)
        else:
            yield from _read_lines(path, file)


def _read_lines(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """One record a line; a file of a million records is never held whole."""
    number = 0
    while line := file.readline(MAX_LINE):  # as bytes: in text more than a line feed ends a line
        number += 1
        if len(line) == MAX_LINE and not line.endswith(b"\n"):
            while (more := file.readline(MAX_LINE)) and not more.endswith(b"\n"):
                pass
            yield f"{path}:{number}", NanoVLMError(f"is a line of more than {MAX_LINE >> 20} MiB")
        elif line := line.removeprefix(codecs.BOM_UTF8).strip():
            yield f"{path}:{number}", _parse_line(line.decode(errors="surrogateescape"))


def _read_list(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """The records of a JSON list; one of a million records is never held whole."""
    for number, (_, entry) in enumerate(stream_json(path, file), start=1):
        yield f"{path}: record {number}", _encodable(entry)


def _parse_line(line: str) -> Any:
    try:
        return _encodable(json.loads(line))
    except json.JSONDecodeError as error:
        hint = "; a list of records belongs in a file named .json" if line[0] == "[" else ""
        return NanoVLMError(f"is not valid JSON ({error.msg}, column {error.colno}){hint}")
    except (ValueError, RecursionError):
        return NanoVLMError("has a number or a nesting without end")


def _encodable(entry: Any) -> Any:
    """The entry, or a NanoVLMError if it holds what UTF-8 cannot."""
    try:
        json.dumps(entry, ensure_ascii=False).encode()
        return entry
    except UnicodeEncodeError as error:
        character = error.object[error.start]
        if "\udc80" <= character <= "\udcff":
            return NanoVLMError("is not UTF-8 text; save the file as UTF-8")
        return NanoVLMError(f"holds {character!r}, half of a character; write all of it")
    except RecursionError:
        return NanoVLMError("has a nesting without end")
