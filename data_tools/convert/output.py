"""The folder that is written: records, images or shards of them, and where a second run goes on.

`records.jsonl` appears when all of it is complete. Until then its lines are in a hidden file, and a
journal says how far they are known to be right: what is beyond is cut off and written again.
"""

import json
import os
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.convert.images import Image
from data_tools.convert.report import Report
from data_tools.pack_tar import add_member
from nanovlm.data.records import Record
from nanovlm.errors import NanoVLMError
from nanovlm.utils.files import read_json, temporary_beside, write_json
from nanovlm.utils.outputs import LOCK, only_writer

RECORDS, REPORT, IMAGES = "records.jsonl", "report.json", "images"
JOURNAL, PART = ".convert.json", ".records.jsonl.part"
SHARD_SIZE = 10_000  # images of a shard, as pack_tar has it
SAVE_EVERY = 2.0  # seconds between two entries of the journal


class Output:
    """An output folder, which one process writes.

    `settings` say what is converted and how: only the same conversion goes on where one was killed.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, pack: bool) -> None:
        self.folder, self._settings, self._pack = folder, settings, pack
        journal = self._read_journal()
        self.rows: int = journal["rows"]  # that have been converted
        self.report = Report(**journal["report"])
        self._shard: int = journal["shard"]  # number of the shard that is being written
        self._in_shard: int = journal["in_shard"]
        self._tar: tarfile.TarFile | None = None
        self._tar_file: BinaryIO | None = None
        self._places: dict[str, int] = {}  # name of an image -> number of its shard
        self._records = _reopened(folder / PART, journal["bytes"])
        if pack:
            self._reopen_shards(journal["shard_bytes"])
        self._saved = time.monotonic()
        self._save()

    def write(self, record: Record, images: Sequence[Image]) -> None:
        """Write a record and the images that it is the first to show."""
        names = [self._store(image) for image in images]
        line = json.dumps(record.to_entry(names), ensure_ascii=False) + "\n"
        self._records.write(line.encode(errors="backslashreplace"))
        self.report.records_in += 1
        self.report.records_out += 1
        self.report.images += len(names)

    def advance(self, rows: int) -> None:
        """Note that so many more rows are done; from time to time that is kept on disk."""
        self.rows += rows
        if time.monotonic() - self._saved > SAVE_EVERY:
            self._save()

    def finish(self, source: dict[str, Any]) -> None:
        """Make the folder complete. `source` is what its report says about the source."""
        self._close_shard()
        self._records.flush()
        os.fsync(self._records.fileno())
        self._records.close()
        stored = len(self._places) if self._pack else _count_files(self.folder / IMAGES)
        write_json(
            self.folder / REPORT, {**source, **self.report.to_json(), "images_stored": stored}
        )
        os.replace(self.folder / PART, self.folder / RECORDS)
        (self.folder / JOURNAL).unlink()

    def discard(self) -> None:
        """Delete what was written, when none of it is of use."""
        self._close_shard()
        self._records.close()
        for path in (*self.folder.glob("shard-*.tar"), self.folder / PART, self.folder / JOURNAL):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """End as it is; a second run goes on from the last entry of the journal."""
        self._records.close()
        if self._tar_file is not None:
            self._tar_file.close()

    def _store(self, image: Image) -> str:
        if image.data is None:
            return image.name
        if not self._pack:
            name = f"{IMAGES}/{image.name[:2]}/{image.name}"
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != len(image.data):
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = temporary_beside(path)
                temporary.write_bytes(image.data)  # whole under its name, even after a kill
                os.replace(temporary, path)
            return name
        if image.name not in self._places:
            if self._in_shard == SHARD_SIZE:
                self._close_shard()
                self._shard, self._in_shard = self._shard + 1, 0
            if self._tar is None:
                self._tar_file = _reopened(self._shard_path(self._shard), 0)
                self._tar = tarfile.TarFile(fileobj=self._tar_file, mode="w")
            add_member(self._tar, image.name, image.data)
            self._places[image.name] = self._shard
            self._in_shard += 1
        return f"{self._shard_path(self._places[image.name]).name}::{image.name}"

    def _shard_path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05}.tar"

    def _close_shard(self) -> None:
        if self._tar is not None and self._tar_file is not None:
            self._tar.close()
            self._tar_file.close()
        self._tar = self._tar_file = None

    def _reopen_shards(self, size: int) -> None:
        """Take up the shard that was being written, cut off after `size` bytes."""
        if size:
            self._tar_file = _reopened(self._shard_path(self._shard), size)
            self._tar = tarfile.TarFile(fileobj=self._tar_file, mode="w")
        for number in range(self._shard + bool(size)):
            with tarfile.open(self._shard_path(number)) as tar:
                self._places |= dict.fromkeys(tar.getnames(), number)

    def _read_journal(self) -> dict[str, Any]:
        path = self.folder / JOURNAL
        if path.is_file() and not (self.folder / RECORDS).exists():
            journal = read_json(path)
            if journal.get("settings") != self._settings:
                raise NanoVLMError(
                    f"{self.folder}: holds an unfinished conversion of another source, or with "
                    "other flags, or of files that have changed; delete it, or name another "
                    "folder with --out"
                )
            return journal
        if names := sorted(set(os.listdir(self.folder)) - {LOCK, JOURNAL}):
            raise NanoVLMError(
                f"{self.folder}: holds {names[0]} already; name a new or an empty folder with --out"
            )
        return {"rows": 0, "bytes": 0, "shard": 0, "in_shard": 0, "shard_bytes": 0, "report": {}}

    def _save(self) -> None:
        for file in (self._tar_file, self._records):
            if file is not None:
                file.flush()
                os.fsync(file.fileno())
        write_json(
            self.folder / JOURNAL,
            {
                "settings": self._settings,
                "rows": self.rows,
                "bytes": self._records.tell(),
                "shard": self._shard,
                "in_shard": self._in_shard,
                "shard_bytes": self._tar_file.tell() if self._tar_file is not None else 0,
                "report": self.report.to_json(),
            },
        )
        self._saved = time.monotonic()


@contextmanager
def output(folder: Path, settings: dict[str, Any], *, pack: bool) -> Iterator[Output]:
    """An output folder to write to; what has been done is kept when an error ends the work."""
    with only_writer(folder, "--out"):
        writing = Output(folder, settings, pack=pack)
        try:
            yield writing
        except BaseException as error:
            if isinstance(error, OSError):  # a full disk does not name the file
                error.filename = error.filename or str(folder)
            with suppress(OSError):
                writing.close()
            raise


def _reopened(path: Path, size: int) -> BinaryIO:
    """A file to write on with, cut off after `size` bytes."""
    if size > (path.stat().st_size if path.exists() else 0):
        raise NanoVLMError(f"{path}: is not as it was left; delete {path.parent}, and begin anew")
    file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 (closed by its owner)
    file.truncate(size)
    file.seek(size)
    return file


def _count_files(folder: Path) -> int:
    """The images in a folder, without what a killed process left under a hidden name."""
    names = (name for _, _, names in os.walk(folder) for name in names)
    return sum(not name.startswith(".") for name in names)
