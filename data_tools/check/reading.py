"""The records of a command line, read as training reads them, with all that it would skip."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanovlm.data.forms import present
from nanovlm.data.preferences import ANSWERS, REJECTED, parse_pair
from nanovlm.data.records import Record, parse_record, read_entries, record_files
from nanovlm.errors import NanoVLMError
from nanovlm.utils.files import open_regular

# What differs between records that are skipped for one reason: texts, paths, numbers.
_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")
_PATH = re.compile(r"(?:(?<=image )|(?<=^))[^ ]*[/\\.][^ ]* ")
_NUMBER = re.compile(r"(?<![\w-])\d[\d,.]*")  # but UTF-8


@dataclass
class Split:
    """The records of one flag."""

    name: str  # data, val or against
    records: list[Record] = field(default_factory=list)  # those that training can use
    skipped: list[str] = field(default_factory=list)  # a line for each of the others


def read_split(name: str, data: str, images: Path | None) -> Split:
    """All records that `data` names, those that cannot be used among `skipped`.

    Records with references have no answer: training skips them, but an evaluation reads them, and
    so does `against`. Raises NanoVLMError for a file that cannot be read or holds no records.
    """
    split, files = Split(name), files_of(data)
    with tqdm(desc=f"reading {name}", unit="record", leave=False, dynamic_ncols=True) as bar:
        for path in files:
            number = bar.n
            for where, entry, folder in entries_of(path, images):
                try:
                    record = parse(entry, where, folder)
                    if record.references and name != "against":
                        raise NanoVLMError(
                            f"{where}: has references and no answer; it is for evaluation, not for "
                            "training"
                        )
                    split.records.append(record)
                except NanoVLMError as error:
                    split.skipped.append(str(error))
                bar.update()
            if bar.n == number:
                raise NanoVLMError(f"{path}: holds no records")
    return split


def files_of(data: str) -> list[Path]:
    """The files that `data` names; raises NanoVLMError for one that cannot be opened."""
    files = record_files(data)
    for path in files:
        open_regular(path).close()
    return files


def entries_of(path: Path, images: Path | None) -> Iterator[tuple[str, Any, Path]]:
    """The place of each record of a file, its JSON, and the folder of its images."""
    folder = path.parent if images is None else images
    if not folder.is_dir():
        raise NanoVLMError(f"{folder}: is not a folder; say with --images where the images are")
    for where, entry in read_entries(path):
        yield where, entry, folder


def parse(entry: Any, where: str, folder: Path) -> Record:
    """The record of an entry; of a pair of answers, with the better one as its own."""
    keys = present(entry) if isinstance(entry, dict) else ()
    is_pair = any(key in keys for key in (*ANSWERS, REJECTED))
    return (parse_pair if is_pair else parse_record)(entry, where, folder)


def reason_of(line: str) -> str:
    """Why a record is skipped, without what is its own: one text for all with one reason."""
    where = re.match(r".*?(?::\d+|: record \d+): ", line)
    reason = line[where.end() :] if where else line
    return _NUMBER.sub("N", _QUOTED.sub("'…'", _PATH.sub("… ", reason)))
