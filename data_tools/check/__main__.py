"""Look at records before training on them.

    python -m data_tools.check data/scenes/train.jsonl --val data/scenes/val.jsonl --out checked

prints what the records hold and what is wrong with them, and writes `report.json`, `report.html`
(the worst examples of each finding) and `samples.png` (a random sample) into a new folder. Records
and images are read as training reads them, so what is skipped here is skipped there.

    python -m data_tools.check photos.jsonl --drop broken,duplicates,garbled --keep cleaned.jsonl

also writes a new file of records. The exit code is 0 when the data could be looked at, whatever
was found; with `--strict` it is 1 if anything was. The same data gives the same report with any
number of workers.
"""

# First, because Ctrl-C is one line from here on, also during the slow imports below.
from nanovlm.utils.console import printable, run_command, say

# isort: split
import argparse
import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.check.filtering import UNUSABLE, write_kept
from data_tools.check.findings import KINDS, Finding
from data_tools.check.lengths import encoder_of, measure_lengths, summarise
from data_tools.check.looking import Images, find, too_long
from data_tools.check.page import draw_page
from data_tools.check.reading import Split, files_of, read_split
from data_tools.check.sheet import choose, draw_sheet
from data_tools.check.summary import readable, summarise_split
from nanovlm.data.workers import MOST_WORKERS
from nanovlm.errors import NanoVLMError
from nanovlm.utils.files import to_jsonl, write_atomically
from nanovlm.utils.outputs import check_new_file, check_no_input, new_folder
from nanovlm.utils.parser import CommandParser, expand_user


def main() -> int:
    """Read, look, print; write the report and the records to keep."""
    arguments = _parser().parse_args()
    inputs = _check(arguments)
    with new_folder(arguments.out, "--out") if arguments.out else nullcontext() as folder:
        report, is_clean = _look(arguments, inputs, folder)
    _print(arguments, report)
    return int(arguments.strict and not is_clean)


def _look(
    arguments: argparse.Namespace, inputs: dict[str, str], folder: Path | None
) -> tuple[dict[str, Any], bool]:
    """The report, and whether nothing was found; writes what the flags ask for."""
    splits = [
        read_split(name, path, None if name == "against" else arguments.images)
        for name, path in inputs.items()
    ]
    images = Images.of(splits, arguments.workers)
    looked_at = [split for split in splits if split.name != "against"]
    findings = {split.name: find(split, images) for split in looked_at}
    report: dict[str, Any] = {"inputs": inputs, "splits": {}}
    if arguments.model or arguments.tokenizer:
        report["lengths"], long = _measure(splits[0], arguments)
        findings["data"] = sorted([*findings["data"], *long], key=lambda found: found.record)
    for split in looked_at:
        found = findings[split.name]
        report["splits"][split.name] = summarise_split(split, images, found)
    if arguments.keep:
        data, kinds = (arguments.data, arguments.images), arguments.drop
        report["kept"] = write_kept(arguments.keep, splits[0], *data, findings["data"], kinds)
    if folder is not None:
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        write_atomically(folder / "report.json", text.encode(errors="backslashreplace"))
        draw_page(folder / "report.html", report, findings, looked_at, images)
        if sample := choose(splits[0].records, seed=arguments.seed):
            draw_sheet(folder / "samples.png", sample)
    return report, not any(split.skipped or findings[split.name] for split in looked_at)


def _print(arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    if arguments.json:
        print(to_jsonl([report]), end="")
    else:
        print("\n".join(map(printable, readable(report))))
    if kept := report.get("kept"):
        reasons = (f"{n:,} {kind}" for kind, n in kept.items() if kind not in ("kept", UNUSABLE))
        say(
            f"{arguments.keep}: {kept.get('kept', 0):,} records; dropped: {', '.join(reasons)}"
            + (f"; {kept[UNUSABLE]:,} {UNUSABLE}" if UNUSABLE in kept else "")
        )
    if arguments.out:
        say(f"look at {arguments.out / 'report.html'} and {arguments.out / 'samples.png'}")


def _measure(split: Split, arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Finding]]:
    """The lengths of records in tokens, and those beyond the limit."""
    encoder = encoder_of(arguments.model, arguments.tokenizer, arguments.image_tokens)
    measured = measure_lengths(split.records, encoder, arguments.max_length, arguments.workers)
    bar = tqdm(measured, "counting tokens", len(split.records), unit="record", dynamic_ncols=True)
    lengths = list(bar)
    long = [
        too_long(number, length.tokens, length.skipped)
        for number, length in enumerate(lengths)
        if length.tokens > arguments.max_length
    ]
    of = f"{arguments.model or arguments.tokenizer}"
    if arguments.tokenizer:
        of += f" and {arguments.image_tokens} visual tokens an image (--image-tokens)"
    return {"of": of, **summarise(lengths, arguments.max_length)}, long


def _check(arguments: argparse.Namespace) -> dict[str, str]:
    """Refuse flags that make no sense; returns what is read, by the name of its flag."""
    inputs = {"data": arguments.data, "val": arguments.val, "against": arguments.against}
    inputs = {name: path for name, path in inputs.items() if path}
    files = [path for given in inputs.values() for path in files_of(given)]
    if bool(arguments.keep) != bool(arguments.drop):
        raise NanoVLMError(
            "--drop says which records to leave out and --keep where to write the others; "
            "give both, or none of them"
        )
    if arguments.model and arguments.tokenizer:
        raise NanoVLMError("--model has a tokenizer of its own; leave out --tokenizer or --model")
    if arguments.image_tokens < 0 or arguments.max_length < 1 or arguments.workers < 0:
        raise NanoVLMError("--image-tokens, --max-length and --workers have to be above 0")
    if arguments.keep:
        check_new_file(arguments.keep, "--keep", files)
    if arguments.out:
        check_no_input(arguments.out, "--out", files)
    return inputs


def _kinds(text: str) -> list[str]:
    """`broken,garbled` as the names of findings."""
    kinds = [kind.strip() for kind in text.split(",") if kind.strip()]
    for kind in kinds:
        if kind not in KINDS:
            raise NanoVLMError(f"--drop: no finding is called {kind}; there are {', '.join(KINDS)}")
    return kinds


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m data_tools.check",
        description="Look at records before training on them.",
        epilog="Findings, and names for --drop: "
        + "; ".join(f"{kind}: {what}" for kind, what in KINDS.items()).replace("%", "%%")
        + ".",
    )
    cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    parser.add_argument(
        "data", type=expand_user, metavar="DATA", help="records, as --data of training takes them"
    )
    for flag, metavar, help in (
        ("--val", "FILE", "held-out records, looked at as well"),
        ("--against", "FILE", "evaluation records whose images must not be in the others"),
    ):
        parser.add_argument(flag, type=expand_user, metavar=metavar, help=help)
    for flag, metavar, help in (
        (
            "--images",
            "DIR",
            "folder of the images of DATA and --val (default: the records' folder)",
        ),
        ("--model", "DIR", "model folder, to count tokens as it does"),
        ("--tokenizer", "DIR", "tokenizer of a language model, to count tokens with"),
        ("--out", "DIR", "new folder for report.json, report.html and samples.png"),
        ("--keep", "FILE", "new file for the records that --drop leaves"),
    ):
        parser.add_argument(flag, type=Path, metavar=metavar, help=help)
    parser.add_argument(
        "--drop", type=_kinds, metavar="NAME,NAME", help="findings to leave out, named below"
    )
    for flag, default, help in (
        ("--image-tokens", 0, "visual tokens of an image, with --tokenizer"),
        ("--max-length", 2048, "tokens of a record, above which training cuts it"),
        ("--workers", min(MOST_WORKERS, len(cores)), "processes that open images"),
        ("--seed", 0, "of the random sample"),
    ):
        note = f"{help} (default: {default})"
        parser.add_argument(flag, type=int, default=default, metavar="N", help=note)
    parser.add_argument("--json", action="store_true", help="print the report as one JSON line")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if anything was found")
    return parser


if __name__ == "__main__":
    run_command(main)
