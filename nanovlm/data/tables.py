"""The rows of any table: JSON, JSON Lines, CSV and its like, parquet; never held whole."""

import codecs
import csv
import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from nanovlm.data.records import read_entries
from nanovlm.errors import NanoVLMError, quoted
from nanovlm.inputs.parquet import parquet_rows
from nanovlm.utils.files import open_regular
from nanovlm.utils.sniff import FIRST_BYTES, what_is

DELIMITERS = "\t|;,"
MAX_FIELD = 2**20  # characters of a field of a CSV: beyond, a quote was opened and never closed


class Row(NamedTuple):
    """A row of a table, or a NanoVLMError with the reason why it cannot be read."""

    where: str  # its name in messages
    value: Any
    folder: Path  # that its image paths may be relative to


def rows(path: Path, start: int = 0, longest: int = MAX_FIELD) -> Iterator[Row]:
    """The rows of a table from number `start` on; `longest` as in `csv_rows`."""
    with open_regular(path) as file:
        what = what_is(file.read(FIRST_BYTES))
    if what and what.startswith("a parquet table"):
        for number, value in enumerate(parquet_rows(path, start), start=start + 1):
            yield Row(f"{path}: row {number}", value, path.parent)
        return
    found = csv_rows(path, longest) if is_csv(path) else read_entries(path)
    for where, value in islice(found, start, None):
        yield Row(where, value, path.parent)


def is_csv(path: Path) -> bool:
    """Whether a file is text with columns, by its first line."""
    with open_regular(path) as file:
        head = file.read(FIRST_BYTES)
    if what_is(head) not in (None, "YAML", "TOML"):
        return False
    first = head.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")[0]
    return first[:1] not in (b"{", b"[") and any(sign.encode() in first for sign in DELIMITERS)


def csv_rows(path: Path, longest: int = MAX_FIELD) -> Iterator[tuple[str, Any]]:
    """The rows of a CSV or TSV file as objects, by the names in its first line, in lower case.

    longest: characters of a field at most, more where images stand in the file.
    """
    csv.field_size_limit(longest)
    with open_regular(path) as binary:
        lines = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
        try:
            header = _clean(lines.readline())
            delimiter = max(DELIMITERS, key=header.count)
            reader = csv.reader(lines, delimiter=delimiter)
            names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
            lowered = [name.lower() if name.isascii() else name for name in names]
            for cells in reader:
                where = f"{path}:{reader.line_num + 1}"
                if delimiter == "\t" and (taken_in := sum(map(_rows_inside, cells))):
                    yield (
                        where,
                        NanoVLMError(
                            f"a quote that opens {taken_in} lines above closes here, with whole "
                            "rows between; take it out, or double it"
                        ),
                    )
                elif len(cells) == len(names):
                    yield where, dict(zip(lowered, map(str.strip, cells)))
                elif any(map(str.strip, cells)):
                    yield (
                        where,
                        NanoVLMError(f"has {len(cells)} columns, and the first line {len(names)}"),
                    )
        except UnicodeDecodeError:
            raise NanoVLMError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
        except csv.Error as error:
            raise NanoVLMError(
                f"{path}: cannot be read as a table ({error}); is a quote never closed?"
            ) from None


def _rows_inside(cell: str) -> int:
    """Line ends in a cell of a TSV that has tabs as well: rows that a stray quote took in."""
    return cell.count("\n") if "\t" in cell else 0


def _clean(line: str) -> str:
    if "\0" in line:
        raise NanoVLMError(f"{quoted(line[:40])} is no first line of a table")
    return line.rstrip("\r\n")
