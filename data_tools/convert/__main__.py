"""Turn a published data set into the records that training reads (docs/en/data.md).

    python -m data_tools.convert SOURCE --out DIR

writes DIR/records.jsonl, the images that lay in tables, zip archives or records (DIR/images), and
DIR/report.json. Images that lie in files stay there, and records name them relative to DIR;
`--shards` packs all of them into DIR/shard-00000.tar and so on. The same command goes on where a
killed one was, with the same bytes in the end.
"""

import argparse
import hashlib
import os
import shlex
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.convert.images import ImageFinder, ImageReader
from data_tools.convert.output import RECORDS, REPORT, Output, output
from data_tools.convert.pipeline import Converter, convert_rows, cores
from data_tools.convert.recognise import FORMS, Source, recognise
from data_tools.convert.report import Report, printed
from nanovlm.errors import NanoVLMError
from nanovlm.utils.console import run_command, say
from nanovlm.utils.outputs import check_no_input
from nanovlm.utils.parser import CommandParser

MOST_LEFT_OUT = 10  # files that are named on stderr; report.json has all


@dataclass(frozen=True)
class Task:
    """What is to be converted, and how."""

    source: Path
    out: Path
    form: str | None = None  # None: the one that it looks like
    images: Path | None = None  # None: beside the records
    limit: int | None = None  # of the records written
    shards: bool = False
    threads: int | None = None  # None: one a core


def convert(task: Task) -> Report:
    """Convert a source, or go on where a killed process was; see the module's docstring."""
    inputs = [place for place in (task.source, task.images) if place is not None]
    for place in inputs:
        if not place.exists():
            raise NanoVLMError(f"{place}: does not exist; check the path")
    check_no_input(task.out, "--out", filter(Path.is_dir, inputs))
    source = recognise(task.source, task.form)
    rows = f", {source.total:,} rows" if source.total else ""
    files = f"{len(source.files):,} file" + ("s" if len(source.files) > 1 else "")
    say(f"{task.source}: {source.form}, {files}{rows}")
    for name, reason in list(source.left_out.items())[:MOST_LEFT_OUT]:
        say(f"left out: {name} {reason}")
    if (more := len(source.left_out) - MOST_LEFT_OUT) > 0:
        say(f"left out: {more:,} more, which {REPORT} names")
    with output(task.out, _settings(source, task), pack=task.shards) as writing:
        _write(source, task, writing)
        return writing.report


def _write(source: Source, task: Task, writing: Output) -> None:
    """Write what is not written yet, and complete the folder.

    Raises NanoVLMError, and leaves nothing, if no record can be used.
    """
    if writing.rows:
        say(f"{task.out}: goes on after {writing.rows:,} rows")
    finder = ImageFinder(task.images or source.folder, is_given=task.images is not None)
    converter = Converter(source.kind, finder, ImageReader(task.out, pack=task.shards))
    rows = source.read(writing.rows)
    bar = tqdm(total=source.total, initial=writing.rows, desc="converting", unit="row",
               dynamic_ncols=True)  # fmt: skip
    with bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pillow's, which threads cannot silence by themselves
        for done in convert_rows(rows, converter, writing, task.limit, task.threads or cores()):
            bar.update(done)
    report = writing.report
    if not report.records_out:
        writing.discard()
        what = f"none of its {report.records_in:,} records can be used"
        raise NanoVLMError(
            f"{task.source}: {what if report.records_in else 'holds no records'}",
            *(f"  {line}" for line in report.lines()),
        )
    about = {"source": printed(str(task.source)), "form": source.form, "holds": source.kind}
    left_out = {printed(name): printed(reason) for name, reason in source.left_out.items()}
    writing.finish({**about, "left_out": left_out})


def _settings(source: Source, task: Task) -> dict[str, Any]:
    """What makes a conversion the same one: its source, file by file, and its flags."""
    files = [(os.path.realpath(file), os.stat(file)) for file in source.files]
    states = [(name, status.st_size, status.st_mtime_ns) for name, status in files]
    return {
        "form": source.form,
        "files": hashlib.sha256(repr(states).encode()).hexdigest(),
        "images": printed(os.path.realpath(task.images)) if task.images else None,
        "limit": task.limit,
        "shards": task.shards,
    }


def parse_arguments() -> argparse.Namespace:
    """Read the flags."""
    forms = "\n".join(
        textwrap.fill(text, 100, initial_indent=f"  {name:14} ", subsequent_indent=" " * 17)
        for name, text in FORMS.items()
    )
    parser = CommandParser(
        prog="python -m data_tools.convert",
        description="Turn a published data set into the records that training reads.",
        epilog=f"forms, recognised by looking:\n{forms}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="file or folder, as published")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--as",
        dest="form",
        choices=FORMS,
        metavar="FORM",
        help="the form of SOURCE, if it is to be another than it looks like",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="PLACE",
        help="folder, zip or tar of the images (default: beside the records)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="write at most N records")
    parser.add_argument(
        "--shards", action="store_true", help="pack all images into tar files, 10,000 each"
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads that open images (default: one a core, 8 at most)",
    )
    return parser.parse_args()


def main() -> None:
    """Check the flags, convert, say what became of the records."""
    arguments = parse_arguments()
    for name in ("limit", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise NanoVLMError(f"--{name} is {value}; it has to be 1 or more")
    report = convert(Task(**vars(arguments)))
    for line in report.lines():
        say(line)
    lost = 1 - report.records_out / report.records_in
    share = f", {lost:.1%} skipped" if report.records_out < report.records_in else ""
    records = arguments.out / RECORDS
    say(
        f"{records}: {report.records_out:,} of {report.records_in:,} records{share}",
        "next:  python -m data_tools.check "
        + shlex.join([str(records), "--out", f"{arguments.out}-checked"]),
    )


if __name__ == "__main__":
    run_command(main)
