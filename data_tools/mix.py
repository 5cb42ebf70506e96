"""Mix records of several sources into one file, with a weight for each.

    python -m data_tools.mix photos.jsonl=3 "charts/*.jsonl=1" --out mixed.jsonl --total 100000

A weight is a source's share of the mixture, here 75,000 and 25,000 records. Without weights, each
record of each source is taken once. A source of which more records are taken than it has gives all
of them several times, and some once more; one of which fewer are taken gives a random part.
The sources are interleaved at random, and each keeps the order of its own records. Images are
named from the new file. The same sources, weights and seed give the same bytes.

Records are streamed: a source of any size takes no memory but for a number a record.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a plain clone

# First, because Ctrl-C is one line from here on, also during the slow imports below.
from nanovlm.utils.console import run_command, say

# isort: split
import random
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from data_tools.check.reading import entries_of, files_of, parse
from data_tools.relocation import relocated
from nanovlm.data.records import check_skipped, say_skipped
from nanovlm.errors import NanoVLMError, quoted
from nanovlm.utils.files import to_jsonl
from nanovlm.utils.outputs import check_new_file, new_file
from nanovlm.utils.parser import CommandParser, expand_user


@dataclass
class Source:
    """Records of one file, or of several that one pattern names."""

    name: str
    weight: float | None  # of the mixture; None if none is given
    usable: array = field(default_factory=lambda: array("L"))  # numbers of usable records
    drawn: int = 0  # records to take of it

    @property
    def files(self) -> list[Path]:
        """Its files, sorted."""
        return files_of(self.name)

    def entries(self, chosen: set[int] | None) -> Iterator[tuple[str, Any, Path]]:
        """The usable records once, in order; of them, those whose places are `chosen`."""
        numbers = enumerate(self.usable)
        wanted = (number for place, number in numbers if chosen is None or place in chosen)
        following, number = next(wanted, None), 0
        for path in self.files:
            for item in entries_of(path, None):
                if number == following:
                    yield item
                    following = next(wanted, None)
                number += 1


def parse_source(text: str) -> Source:
    """`photos.jsonl=3` or `photos.jsonl`."""
    text = expand_user(text)
    name, _, weight = text.rpartition("=")
    if not name or not re.fullmatch(r"[0-9]+(\.[0-9]+)?", weight) or Path(text).exists():
        return Source(text, None)
    if not 0 < float(weight) <= 1e6:
        raise NanoVLMError(f"{text}: a weight has to be above 0, and at most 1,000,000")
    return Source(name, float(weight))


def find_usable(source: Source) -> None:
    """Read a source and remember which of its records can be used; the others are named.

    Raises as training does where too many cannot.
    """
    skipped, number = [], 0
    with tqdm(desc=f"reading {source.name}", unit="record", leave=False, dynamic_ncols=True) as bar:
        for path in source.files:
            for where, entry, folder in entries_of(path, None):
                try:
                    parse(entry, where, folder)
                    source.usable.append(number)
                except NanoVLMError as error:
                    skipped.append(str(error))
                number += 1
                bar.update()
    if not number:
        raise NanoVLMError(f"{source.name}: holds no records")
    check_skipped(skipped, number)
    say_skipped(skipped, number)


def share_out(sources: Sequence[Source], total: int) -> None:
    """How many records each source gives; together `total` (0: as many as there are)."""
    total = total or sum(len(source.usable) for source in sources)
    weights = [len(source.usable) if source.weight is None else source.weight for source in sources]
    shares = [total * weight / sum(weights) for weight in weights]
    for source, share in zip(sources, shares):
        source.drawn = int(share)
    # The largest remainders are rounded up, so that the numbers add up to the total.
    rest = sorted(range(len(sources)), key=lambda n: (int(shares[n]) - shares[n], n))
    for number in rest[: total - sum(source.drawn for source in sources)]:
        sources[number].drawn += 1


def draw(source: Source, seed: str) -> Iterator[tuple[str, Any, Path]]:
    """The records that a source gives: all of them as often as they fit, then a random part."""
    epochs, rest = divmod(source.drawn, len(source.usable))
    for _ in range(epochs):
        yield from source.entries(None)
    if rest:
        yield from source.entries(set(random.Random(seed).sample(range(len(source.usable)), rest)))


def interleave(sources: Sequence[Source], seed: int) -> Iterator[tuple[str, Any, Path]]:
    """The records of all sources in a random order of the sources."""
    streams = [draw(source, f"{seed}/{number}") for number, source in enumerate(sources)]
    left = [source.drawn for source in sources]
    generator = random.Random(seed)
    for remaining in range(sum(left), 0, -1):
        place = generator.randrange(remaining)  # among all records that are left
        number = 0
        while place >= left[number]:
            place -= left[number]
            number += 1
        left[number] -= 1
        yield next(streams[number])


def write_mixture(path: Path, sources: Sequence[Source], seed: int) -> None:
    """Write the mixture of sources whose `usable` and `drawn` are known."""
    total = sum(source.drawn for source in sources)
    mixed = tqdm(interleave(sources, seed), "mixing", total, unit="record", dynamic_ncols=True)
    with new_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for where, entry, folder in mixed:
            record = parse(entry, where, folder)
            new = relocated(entry, record, folder, path.parent)
            file.write(to_jsonl([new]))


def main() -> None:
    """Check the flags, count, mix, say what was taken."""
    parser = CommandParser(
        prog="python -m data_tools.mix",
        description="Mix records of several sources into one file, with a weight for each.",
    )
    parser.add_argument(
        "sources",
        type=parse_source,
        nargs="+",
        metavar="SOURCE[=WEIGHT]",
        help="records: a file, or a pattern in quotes; its share of the mixture",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="new .jsonl file")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument(
        "--total", type=int, default=0, metavar="N", help="records (default: as many as there are)"
    )
    arguments = parser.parse_args()
    sources: list[Source] = arguments.sources
    if arguments.total < 0:
        raise NanoVLMError("--total has to be above 0")
    if len({source.weight is None for source in sources}) > 1:
        without = next(source.name for source in sources if source.weight is None)
        raise NanoVLMError(
            f"{quoted(without)} has no weight and others have one; write {without}=1, or leave out "
            "all weights"
        )
    check_new_file(arguments.out, "--out", [path for source in sources for path in source.files])
    for source in sources:
        find_usable(source)
    share_out(sources, arguments.total)
    write_mixture(arguments.out, sources, arguments.seed)
    for source in sources:
        times = source.drawn / len(source.usable)
        note = ", some of them repeated" if times > 1 else ""
        print(
            f"{source.name}: {source.drawn:,} records taken from {len(source.usable):,}, "
            f"each {times:.2f} times{note}"
        )
    say(f"{arguments.out}: {sum(source.drawn for source in sources):,} records")


if __name__ == "__main__":
    run_command(main)
