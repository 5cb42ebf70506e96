"""Published data sets, one file of which is damaged: converted, or refused in one line."""

import json
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from data_tools.convert.__main__ import Task, convert
from tests.data_tools.convert import published
from tests.fuzz.damage import damaged_bytes, damaged_file, damaged_value, to_json
from tests.fuzz.inputs import FaultError, Input, Kind

MAKERS = (
    published.llava_folder, published.cc3m_zip, published.the_cauldron, published.minimind,
    published.rlhf_v, published.ai_challenger, published.coco, published.flickr8k_cn,
    published.flickr8k_csv, published.basic_vlm, published.llama_factory, published.ms_swift,
    published.openai, published.csv, published.folder_of_texts, published.webdataset,
)  # fmt: skip


@cache
def _files(number: int) -> dict[str, bytes]:
    """The files of a data set, by their paths."""
    with TemporaryDirectory() as name:
        MAKERS[number](Path(name))
        paths = sorted(path for path in Path(name).rglob("*") if path.is_file())
        return {f"source/{p.relative_to(name).as_posix()}": p.read_bytes() for p in paths}


def _damaged(rng: Random, name: str, data: bytes) -> bytes:
    """The bytes of a file, a value in them damaged where they are JSON."""
    if name.endswith(".json") and rng.random() < 0.7:
        return to_json(damaged_value(rng, json.loads(data)))
    return damaged_bytes(rng, data)


def make(rng: Random) -> Input:
    """A data set with one file damaged, mostly not an image."""
    files = _files(rng.randrange(len(MAKERS)))
    data = [name for name in files if not name.endswith(".jpg")]
    name = rng.choice(data if rng.random() < 0.9 else list(files))
    damaged = damaged_file(rng, files[name], lambda: _damaged(rng, name, files[name]))
    return Input({**files, name: damaged}, ("--shards",) if rng.random() < 0.3 else ())


def read(input: Input) -> None:
    """Convert it."""
    convert(Task(Path("source"), Path("out"), shards=bool(input.arguments), threads=1))


def check(input: Input, folder: Path, was_read: bool) -> None:
    """The source is as it was, and records are there exactly if it was read."""
    if changed := input.changed(folder):
        raise FaultError(f"changed {', '.join(changed)}")
    if (folder / "out" / "records.jsonl").exists() != was_read:
        raise FaultError("refused, and left records" if not was_read else "read, without records")
    if was_read and (folder / "out" / "report.json").stat().st_size == 0:
        raise FaultError("read, without a report")


KIND = Kind("conversion", make, read, short=20, long=500, check=check)
