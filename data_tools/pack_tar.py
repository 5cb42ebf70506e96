"""Turn records and a folder of images into shards: a file of records and a tar file of images each.

    python data_tools/pack_tar.py --data DIR/train.jsonl --out SHARDS [--images DIR] [--size 10000]

writes SHARDS/shard-00000.jsonl, SHARDS/shard-00000.tar and so on, to be trained on with

    python train_stage1.py --data "SHARDS/*.jsonl"

The records keep their order and all their keys; only their image paths change, to
`shard-00000.tar::a.jpg`. A record that names its images within its turns is written as messages.
An image is stored once, in the shard of the first record that uses it. The same input gives the
same bytes. SHARDS is a new or an empty folder, which appears when all of it is complete.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a plain clone

# First, because Ctrl-C is one line from here on, also during the slow imports below.
from nanovlm.utils.console import run_command, say

# isort: split
import argparse
import hashlib
import tarfile
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import PurePosixPath

from tqdm import tqdm

from nanovlm.data.forms import IMAGES, read_conversation
from nanovlm.data.records import Record, read_entries, read_records, record_files, say_skipped
from nanovlm.errors import NanoVLMError
from nanovlm.inputs import archive, data_uri
from nanovlm.inputs.image import MAX_BYTES
from nanovlm.utils.files import read_bytes, to_jsonl, write_atomically
from nanovlm.utils.outputs import new_folder
from nanovlm.utils.parser import CommandParser, expand_user

Entry = tuple[dict, Record]  # a record as it was written, and as it was read


def pack(data: str, images: Path | None, out: Path, size: int) -> int:
    """Write shards of about `size` images each and return their number; bad records are skipped."""
    records, skipped = read_records(data, images)
    say_skipped(skipped, len(records) + len(skipped))
    usable = {record.where: record for record in records}
    entries = (
        (entry, usable[where])
        for path in record_files(data)
        for where, entry in read_entries(path)
        if where in usable
    )
    places: dict[Path, str] = {}
    count = 0
    with (
        new_folder(out, "--out") as folder,
        tqdm(total=len(records), desc="packing", unit="record", dynamic_ncols=True) as bar,
    ):
        for count, shard in enumerate(split(entries, size), start=1):
            write_shard(folder, f"shard-{count - 1:05}", shard, places, bar)
    return count


def split(entries: Iterable[Entry], size: int) -> Iterator[list[Entry]]:
    """Split entries, in order, so that no shard stores more than `size` new images."""
    shard: list[Entry] = []
    seen: set[Path] = set()
    stored = 0
    for entry, record in entries:
        new = set(record.images) - seen
        if shard and stored + len(new) > size:
            yield shard
            shard, stored = [], 0
        shard.append((entry, record))
        seen |= new
        stored += len(new)
    yield shard


def write_shard(
    folder: Path, name: str, entries: list[Entry], places: dict[Path, str], bar: tqdm
) -> None:
    """Write new images to `name`.tar and the records to `name`.jsonl; `places` is updated."""
    lines, members = [], set()
    with tarfile.open(folder / f"{name}.tar", "w") as tar:
        for entry, record in entries:
            for written, path in zip(read_conversation(entry)[1], record.images):
                if path not in places:
                    member = member_name(written, path)
                    if member in members:
                        raise NanoVLMError(
                            f"image {path}: another file is {member} in {name}.tar; "
                            "rename one of them"
                        )
                    members.add(member)
                    places[path] = f"{name}.tar::{member}"
                    add_image(tar, member, path)
            lines.append(with_images(entry, record, [places[path] for path in record.images]))
            bar.update()
    write_atomically(folder / f"{name}.jsonl", to_jsonl(lines))


def with_images(entry: dict, record: Record, names: list[str]) -> dict:
    """The record with other names for its images, in its own form if one key holds them all."""
    for key in IMAGES:
        if entry.get(key):
            renamed = {**entry, key: names[0] if isinstance(entry[key], str) else names}
            try:
                if read_conversation(renamed)[1] == names:
                    return renamed
            except NanoVLMError:  # its turns name them, too
                pass
    return record.to_entry(names) if names else entry


def member_name(written: str, path: Path) -> str:
    """The name of an image in its tar file: the record's path, or its name in another tar file."""
    if data_uri.is_data_uri(path):
        return f"{hashlib.sha256(data_uri.read(path)).hexdigest()[:24]}.image"
    inside = PurePosixPath(written.rpartition("::")[2].replace("\\", "/"))
    if inside.is_absolute() or ".." in inside.parts:
        raise NanoVLMError(
            f"image {written}: leads out of the images' folder; write paths relative to one folder "
            "that holds all images, and name it with --images"
        )
    return str(inside)


def read_image_file(path: Path, limit: int = MAX_BYTES) -> bytes:
    """The bytes of an image: of a file, of a tar file's member, or of the record itself."""
    if data_uri.is_data_uri(path):
        return data_uri.read(path)
    return archive.read_member(path) if archive.is_member(path) else read_bytes(path, limit)


def add_image(tar: tarfile.TarFile, member: str, path: Path) -> None:
    """Store an image as it is."""
    try:
        data = read_image_file(path)
    except NanoVLMError as error:
        raise NanoVLMError(f"image {path} {error}") from None
    add_member(tar, member, data)


def add_member(tar: tarfile.TarFile, member: str, data: bytes) -> None:
    """Store bytes under a name, without the time and the owner of a file on this machine."""
    header = tarfile.TarInfo(member)
    header.size = len(data)
    tar.addfile(header, BytesIO(data))


def parse_arguments() -> argparse.Namespace:
    """Read the flags."""
    parser = CommandParser(
        description="Turn records and a folder of images into shards: .jsonl and .tar files."
    )
    parser.add_argument(
        "--data",
        type=expand_user,
        required=True,
        metavar="FILE",
        help="records; several with commas, or a pattern, quoted",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder of the images (default: the records' folder)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--size",
        type=int,
        default=10_000,
        metavar="N",
        help="images a shard holds (default: 10,000)",
    )
    return parser.parse_args()


def main() -> None:
    """Check the flags, write the shards, print their number."""
    arguments = parse_arguments()
    if arguments.size < 1:
        raise NanoVLMError(f"--size is {arguments.size}; it has to be 1 or more")
    count = pack(arguments.data, arguments.images, arguments.out, arguments.size)
    say(f"{arguments.out}: {count:,} shards")


if __name__ == "__main__":
    run_command(main)
