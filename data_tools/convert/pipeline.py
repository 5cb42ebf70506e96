"""Rows → records, on several cores and in order: the same bytes whatever the number of threads."""

import dataclasses
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from data_tools.convert.entries import IN_BYTES, KEPT, PAIRS, Entries, read_row
from data_tools.convert.images import Image, ImageFinder, ImageReader
from data_tools.convert.output import Output
from nanovlm.data.preferences import parse_pair
from nanovlm.data.records import Record, parse_record
from nanovlm.data.tables import Row
from nanovlm.errors import NanoVLMError

T = TypeVar("T")
U = TypeVar("U")

ROWS = 16  # that a thread converts at once
BYTES = 2**24  # of the images in them, beyond which they are fewer
MOST_THREADS = 8


class Converted(NamedTuple):
    """What an entry of a row became: a record and its images, or the reason why not."""

    where: str
    record: Record | None
    images: list[Image]
    reason: str = ""


class ConvertedRow(NamedTuple):
    """What a row became."""

    entries: list[Converted]
    note: str  # what was left out of the row, and is no loss


class Converter:
    """Makes records of rows; used by several threads at once."""

    def __init__(self, kind: str, finder: ImageFinder, reader: ImageReader) -> None:
        self._kind, self._finder, self._reader = kind, finder, reader

    def rows(self, rows: list[Row]) -> list[ConvertedRow]:
        return [self._row(row) for row in rows]

    def _row(self, row: Row) -> ConvertedRow:
        try:
            found = read_row(row.value, self._kind)
        except NanoVLMError as error:
            return ConvertedRow([Converted(row.where, None, [], str(error))], "")
        return ConvertedRow([self._entry(row, entry, found) for entry in found.entries], found.note)

    def _entry(self, row: Row, entry: dict[str, Any], found: Entries) -> Converted:
        images: dict[Path, Image] = {}
        by_name: dict[str, Path] = {}

        def find(name: str) -> Path:
            if name not in by_name:  # a pair is parsed twice
                if name.startswith(IN_BYTES):
                    image = self._reader.read(found.images[int(name.removeprefix(IN_BYTES))])
                else:
                    image = self._reader.read(self._finder.find(name, row.folder))
                by_name[name] = Path(image.name)
                images[by_name[name]] = image
            return by_name[name]

        parse: Callable = parse_pair if self._kind == PAIRS else parse_record
        try:
            record = parse(entry, row.where, find)
        except NanoVLMError as error:
            if self._finder.damage is not None:
                raise self._finder.damage from None
            return Converted(row.where, None, [], str(error).removeprefix(f"{row.where}: "))
        kept = {key: entry[key] for key in KEPT if isinstance(entry.get(key), (str, int, float))}
        record = dataclasses.replace(record, extra=kept)
        return Converted(row.where, record, [images[path] for path in record.images])


def convert_rows(
    rows: Iterable[Row], converter: Converter, out: Output, limit: int | None, threads: int
) -> Iterator[int]:
    """Write the records of all rows, up to `limit`; yields the number of rows of each group."""
    for done in in_order(converter.rows, in_groups(rows), threads):
        for row in done:
            if limit is not None and out.report.records_out >= limit:
                return
            for entry in row.entries:
                if entry.record is None:
                    out.report.skip(entry.where, entry.reason)
                elif limit is None or out.report.records_out < limit:
                    out.write(entry.record, entry.images)
            if row.note:
                out.report.passed_over[row.note] = out.report.passed_over.get(row.note, 0) + 1
        out.advance(len(done))
        yield len(done)


def in_groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Groups of rows, small enough that some of them fit in memory with their images."""
    group, size = [], 0
    for row in rows:
        group.append(row)
        size += _size(row.value)
        if len(group) == ROWS or size > BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _size(value: Any) -> int:
    """The bytes of a value that are images or texts, roughly."""
    if isinstance(value, (bytes, str)):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 0


def in_order(function: Callable[[T], U], items: Iterable[T], threads: int) -> Iterator[U]:
    """`function` of each item, in their order, with at most two items waiting for each thread.

    Images are decoded and unpacked, and bytes hashed, without Python's lock.
    """
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[U]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    """How many threads are of use here."""
    if hasattr(os, "sched_getaffinity"):
        return min(MOST_THREADS, len(os.sched_getaffinity(0)))
    return min(MOST_THREADS, os.cpu_count() or 1)
