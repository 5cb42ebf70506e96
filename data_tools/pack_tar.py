"""Turn records and a folder of images into shards: of each, one file of records and one tar file of their images.

    python data_tools/pack_tar.py --data DIR/train.jsonl --out SHARDS [--images DIR] [--size 10000]

writes SHARDS/shard-00000.jsonl, SHARDS/shard-00000.tar and so on, to be trained on with

    python train_stage1.py --data "SHARDS/*.jsonl"

The records keep their order and all their keys; only their image paths change, to `shard-00000.tar::a.jpg`. An image is
stored once, in the shard of the first record that shows it. The same files in give the same bytes out. A shard has its
name once it is complete, the tar file first.
"""

import argparse
import json
import sys
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path, PurePosixPath

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository, so that a plain clone works

from nanovlm import archive  # noqa: E402
from nanovlm.data.records import check_skipped, parse_record, read_entries, record_files  # noqa: E402
from nanovlm.errors import CommandParser, NanoVLMError, run  # noqa: E402
from nanovlm.files import atomic_path, write_atomically  # noqa: E402


def usable_entries(data: str, images: Path | None) -> Iterator[tuple[dict, dict[str, Path]]]:
    """Every usable record as it was written, with its image names and where they are; too many others are an error."""
    skipped, total = [], 0
    for path in record_files(data):
        folder = path.parent if images is None else images
        for where, entry in tqdm(read_entries(path), desc=path.name, unit="record", dynamic_ncols=True):
            total += 1
            try:
                record = parse_record(entry, where, folder)
            except NanoVLMError as error:
                skipped.append(str(error))
                continue
            names = entry.get("images", entry.get("image")) or []
            yield entry, dict(zip([names] if isinstance(names, str) else names, record.images))
    if total == 0:
        raise NanoVLMError(f"{data}: holds no records")
    for reason in skipped:
        print(f"skipped: {reason}", file=sys.stderr)
    check_skipped(skipped, total)


def member_name(name: str) -> str:
    """The name of an image inside its tar file: the path of the record; of one inside another tar file, its part in there."""
    name = name.rpartition("::")[2]
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise NanoVLMError(f"image {name}: leads out of the images' folder; name with --images the folder that holds all, and "
                           "write paths relative to it")
    return str(PurePosixPath(name))


def add_image(tar: tarfile.TarFile, name: str, path: Path) -> None:
    """Store an image as `name`, without the times and owners of this machine."""
    try:
        data = archive.read_member(path) if archive.is_member(path) else path.read_bytes()
    except NanoVLMError as error:
        raise NanoVLMError(f"image {path}: {error}") from None
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, BytesIO(data))


def pack(data: str, images: Path | None, out: Path, size: int) -> int:
    """Write the shards of at most `size` images (those of one record stay together) and return how many there are."""
    entries = usable_entries(data, images)
    places: dict[str, str] = {}  # where each image is by now: its name → shard-00000.tar::name
    taken: set[str] = set()  # the paths in tar files
    entry, count = next(entries, None), 0
    while entry is not None:
        shard, lines, stored = f"shard-{count:05}", [], 0
        with atomic_path(out / f"{shard}.tar") as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            while entry is not None:
                record, paths = entry
                new = {str(path): name for name, path in paths.items() if str(path) not in places}
                if stored and stored + len(new) > size:
                    break
                for path, name in new.items():
                    places[path] = f"{shard}.tar::{member_name(name)}"
                    if places[path] in taken:
                        raise NanoVLMError(f"image {name}: two files would have this name in one tar file; rename one")
                    taken.add(places[path])
                    add_image(tar, member_name(name), Path(path))
                stored += len(new)
                key = "images" if "images" in record else "image"
                if paths:
                    single = isinstance(record[key], str)
                    record[key] = [places[str(paths[name])] for name in ([record[key]] if single else record[key])]
                    record[key] = record[key][0] if single else record[key]
                lines.append(json.dumps(record, ensure_ascii=False) + "\n")
                entry = next(entries, None)
        write_atomically(out / f"{shard}.jsonl", "".join(lines))
        count += 1
    return count


def parse_arguments() -> argparse.Namespace:
    """Read the flags."""
    parser = CommandParser(description="Turn records and a folder of images into shards: .jsonl files with .tar files of images.")
    parser.add_argument("--data", required=True, metavar="FILE", help="records: a file, several with commas, or a pattern in quotes")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder that image paths are relative to (default: the records')")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to; it must hold no shards yet")
    parser.add_argument("--size", type=int, default=10_000, metavar="N", help="images a shard holds (default: 10,000)")
    return parser.parse_args()


def main() -> None:
    """Check the flags, write the shards, say how many."""
    arguments = parse_arguments()
    if arguments.size < 1:
        raise NanoVLMError(f"--size is {arguments.size}; it has to be 1 or more")
    if arguments.out.is_dir() and any(arguments.out.glob("shard-*")):
        raise NanoVLMError(f"{arguments.out}: holds shards already; delete them or choose another --out")
    arguments.out.mkdir(parents=True, exist_ok=True)
    count = pack(arguments.data, arguments.images, arguments.out, arguments.size)
    print(f"{arguments.out}: {count:,} shards", file=sys.stderr)


if __name__ == "__main__":
    run(main)
