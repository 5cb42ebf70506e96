"""Fetch published weights and data sets by name, from Hugging Face, its mirror or ModelScope.

    python -m data_tools.download smolvlm2-256m qwen3-0.6b
    python -m data_tools.download the-cauldron/aokvqa --from modelscope --to /big/disk
    python -m data_tools.download --list

Weights go to `weights/NAME`, data to `data/NAME`, as they are published; the last line of the
output is the next command. An interrupted download goes on where it stopped. Every file is compared
with the digest that the hub lists before it gets its name. `hubs.toml` is the table of names.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a plain clone

# First, because Ctrl-C is one line from here on, also during the slow imports below.
from nanovlm.utils.console import run_command, say

# isort: split
import argparse
import os
import queue
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from data_tools.hub_clients import Hub, Listing, explain, open_hub
from data_tools.hub_files import (
    PARTIAL,
    RECORD,
    HubFile,
    check_path,
    find_lacking,
    has_digest,
    has_size,
    read_record,
    size_of,
)
from data_tools.hubs import HUBS, Entry, find_entry, list_names, next_commands
from nanovlm.errors import NanoVLMError
from nanovlm.utils.files import read_json, write_json
from nanovlm.utils.outputs import only_writer
from nanovlm.utils.parser import CommandParser

WORKERS = 4  # files at once
MARGIN = 100e6  # bytes of a disk that are left free


@dataclass(frozen=True)
class Job:
    """A name, where its files come from and go to, and which of them are not there yet."""

    entry: Entry
    source: str  # one of HUBS
    hub: Hub
    listing: Listing  # of the files needed
    folder: Path
    record: Path
    lacking: list[HubFile]

    def __str__(self) -> str:
        licence = self.listing.licence
        licence = self.entry.licence if licence in ("", "other", "unknown") else licence
        repository = self.entry.repository(self.source)
        return f"{self.hub.address} ({repository}), licence: {licence}"

    @property
    def missing_bytes(self) -> int:
        """How much is still to arrive."""
        return max(sum(file.size for file in self.lacking) - size_of(self.folder / PARTIAL), 0)


def plan(given: str, to: Path, source: str) -> Job | None:
    """What a name needs; None, and a line, if all of it is there."""
    entry, subset = find_entry(given)
    folder = entry.folder_in(to)
    record_path = folder / (f"{RECORD}-{subset}.json" if subset else f"{RECORD}.json")
    record = read_record(record_path)
    if _is_complete(folder, record):
        _say_complete(folder, record["files"], "is complete, nothing to do")
        return None
    repository = entry.repository(source)
    if not repository:
        raise NanoVLMError(
            f"{entry.name}: is not on {source}; take --from {' or --from '.join(entry.hubs)}"
        )
    hub = open_hub(source, repository, entry.kind == "data")
    # An interrupted download goes on at the revision at which it began.
    revision = record.get("revision", "") if record.get("source") == source else ""
    with _one_line_errors(entry, source, hub.address):
        listing = hub.list_files(revision, subset)
        files = _choose(hub, listing, entry, subset)
    if not files:
        raise NanoVLMError(
            f"{hub.address} ({repository}): holds no "
            f"{' and no '.join(entry.files).format(subset=subset)}"
        )
    for file in files:
        check_path(file.path, repository)
    for name in entry.files:
        if "*" not in name and name not in {file.path for file in files}:
            say(f"{entry.name}: {hub.address} ({repository}) has no {name} (any more)")
    listing = Listing(listing.revision, listing.licence, files)
    lacking = find_lacking(folder, files, record.get("files", {}))
    return Job(entry, source, hub, listing, folder, record_path, lacking)


def _is_complete(folder: Path, record: dict[str, Any]) -> bool:
    return record.get("complete") is True and all(
        has_size(folder / path, size) for path, (size, _) in record["files"].items()
    )


def _choose(hub: Hub, listing: Listing, entry: Entry, subset: str) -> list[HubFile]:
    """The files that an entry needs; of shards, those that its index names for its tensors."""
    files = [file for file in listing.files if entry.wants(file.path, subset)]
    if not entry.tensors:
        return files
    indices = [file for file in files if file.path.endswith(".index.json")]
    with tempfile.TemporaryDirectory() as folder:
        for file in indices:
            check_path(file.path, entry.hf)
            places = read_json(hub.fetch(file, listing.revision, Path(folder))).get("weight_map")
            if not isinstance(places, dict):
                raise NanoVLMError(f"{file.path}: has no weight_map; try another --from")
            shards = {shard for name, shard in places.items() if name.startswith(entry.tensors)}
            files += [file for file in listing.files if file.path in shards]
    return files


def check_room(jobs: list[Job], to: Path) -> None:
    """Refuse what would not fit on the disk."""
    there = next(folder for folder in (to, *to.absolute().parents) if folder.is_dir())
    needed, free = sum(job.missing_bytes for job in jobs), shutil.disk_usage(there).free
    if needed + MARGIN > free:
        raise NanoVLMError(
            f"{to}: {_amount(needed)} are needed, and {_amount(free)} are free; "
            "free some room, or name a folder on another disk with --to"
        )


def fetch(job: Job) -> None:
    """Fetch what is lacking, check it, and move it to its place."""
    with only_writer(job.folder, "--to"):
        say(f"{job.folder}: {_amount(job.missing_bytes, len(job.lacking))} from {job}")
        there = [file for file in job.listing.files if file not in job.lacking]
        files = {file.path: (file.size, file.digest) for file in there}
        record = {"source": job.source, "revision": job.listing.revision, "from": str(job)}
        record |= {"complete": False, "files": files}
        partial = job.folder / PARTIAL
        partial.mkdir(exist_ok=True)
        write_json(job.record, record)
        with _one_line_errors(job.entry, job.source, job.hub.address):
            for file in _each_done(job):
                files[file.path] = (file.size, file.digest)
                write_json(job.record, record)
        shutil.rmtree(partial)
        write_json(job.record, record | {"complete": True})
    _say_complete(job.folder, files, "is complete")


def _fetch_one(job: Job, file: HubFile) -> None:
    arrived = job.hub.fetch(file, job.listing.revision, job.folder / PARTIAL)
    if not has_size(arrived, file.size) or not has_digest(arrived, file.digest):
        arrived.unlink()
        raise NanoVLMError(
            f"{file.path}: arrived with another digest than {job.hub.address} lists, and was "
            "removed; the same command fetches it again"
        )
    target = job.folder / file.path
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(arrived, target)


def _each_done(job: Job) -> Iterator[HubFile]:
    """Fetch what is lacking, several files at once; each as it is done. Raises the first error.

    The threads are daemons: Ctrl-C and errors end the command without waiting for them.
    """
    waiting: queue.SimpleQueue[HubFile] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[HubFile, Exception | None]] = queue.SimpleQueue()
    stopped = threading.Event()
    for file in job.lacking:
        waiting.put(file)

    def work() -> None:
        with suppress(queue.Empty):
            while not stopped.is_set():
                file = waiting.get_nowait()
                try:
                    _fetch_one(job, file)
                    done.put((file, None))
                except Exception as error:
                    done.put((file, error))

    for _ in range(min(WORKERS, len(job.lacking))):
        threading.Thread(target=work, name="fetch", daemon=True).start()
    total, complete = sum(file.size for file in job.lacking), 0
    bar = tqdm(
        total=total,
        initial=size_of(job.folder / PARTIAL),
        desc=job.entry.name,
        unit="B",
        unit_scale=True,
        leave=False,
        disable=None,  # in a file or a pipe
    )
    try:
        for _ in job.lacking:
            while True:  # a wait without an end could not be interrupted on Windows
                with suppress(queue.Empty):
                    file, error = done.get(timeout=0.5)
                    break
                bar.update(complete + size_of(job.folder / PARTIAL) - bar.n)
            if error is not None:
                raise error
            complete += file.size
            yield file
    finally:
        stopped.set()
        bar.close()


@contextmanager
def _one_line_errors(entry: Entry, source: str, address: str) -> Iterator[None]:
    """Makes one line of what the hubs' libraries raise, with the other hubs to try."""
    try:
        yield
    except NanoVLMError:
        raise
    except Exception as error:
        line = explain(error, source, address, entry.repository(source))
        if line is None:
            raise
        others = " or ".join(f"--from {hub}" for hub in entry.hubs if hub != source)
        raise NanoVLMError(
            f"{line}; or try {others}" if others and line.startswith(address) else line
        ) from None


def show(job: Job) -> None:
    """Print what would be fetched."""
    print(f"{job.entry.name}: {job}")
    for file in job.listing.files:
        mark = "" if file in job.lacking else "  (is there)"
        print(f"{_amount(file.size):>10}  {job.folder / file.path}{mark}")
    print(f"{_amount(job.missing_bytes):>10}  to fetch; nothing was written")


def _say_complete(folder: Path, files: dict[str, Any], state: str) -> None:
    total = sum(size for size, _ in files.values())
    say(f"{folder}: {state} ({_amount(total, len(files))})")


def _amount(size: float, files: int | None = None) -> str:
    """ "1.02 MB", or "1.02 MB in 4 files"."""
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    name, scale = next(((name, scale) for name, scale in units if size >= scale), ("B", 1))
    number = f"{size / scale:.{0 if scale == 1 else 2}f} {name}"
    return number if files is None else f"{number} in {files} file{'s' * (files != 1)}"


def parse_arguments() -> argparse.Namespace:
    """Read the flags."""
    parser = CommandParser(
        prog="python -m data_tools.download",
        description="Fetch published weights and data sets by name.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="names of --list")
    parser.add_argument(
        "--to",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="folder that gets weights/NAME and data/NAME (default: the current one)",
    )
    parser.add_argument(
        "--from",
        dest="source",
        choices=HUBS,
        default="hf",
        help="hf (default; HF_ENDPOINT names a mirror), hf-mirror (hf-mirror.com), or modelscope",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show files, sizes and licence; write nothing"
    )
    parser.add_argument("--list", action="store_true", help="show the names")
    return parser.parse_args()


def main() -> None:
    """Fetch all names, or show them."""
    arguments = parse_arguments()
    if arguments.list:
        print(list_names())
        return
    if not arguments.names:
        raise NanoVLMError("no name is given; --list shows the names")
    names = list(dict.fromkeys(arguments.names))
    jobs = [job for name in names if (job := plan(name, arguments.to, arguments.source))]
    if arguments.dry_run:
        for job in jobs:
            show(job)
        return
    check_room(jobs, arguments.to)
    try:
        for job in jobs:
            fetch(job)
    except KeyboardInterrupt:
        say("interrupted; what has arrived is kept, and the same command goes on from there")
        raise SystemExit(130) from None
    for commands in next_commands(names, arguments.to):
        for word, command in zip(("next", "then"), commands, strict=False):
            say(f"{word}:  {command}")


if __name__ == "__main__":
    run_command(main)
