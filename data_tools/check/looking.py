"""Everything that is wrong with some records: each by itself, and compared with the others."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from data_tools.check.duplicates import copies
from data_tools.check.findings import Finding
from data_tools.check.images import ImageFacts, look_at_images
from data_tools.check.reading import Split
from data_tools.check.texts import problems, shorten, size
from nanovlm.data.records import Record
from nanovlm.inputs.data_uri import is_data_uri

# An answer that is the same for several images: how long it has to be, how many images at least,
# and what share of all. People write the same short caption for many photos.
SAME_ANSWER, SAME_IMAGES, SAME_SHARE = 20, 5, 0.001


@dataclass
class Images:
    """All images of all splits: those of `against` first, then of `val`, then of `data`."""

    paths: list[Path] = field(default_factory=list)
    facts: list[ImageFacts] = field(default_factory=list)
    _number: dict[str, int] = field(default_factory=dict)  # by what `_one_name` gives
    split: list[str] = field(default_factory=list)  # the first that has it
    where: list[str] = field(default_factory=list)  # the first record that has it
    exact: dict[int, int] = field(default_factory=dict)  # copy → the earlier one
    near: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, splits: Iterable[Split], workers: int) -> "Images":
        """Open all images and compare them."""
        images = cls()
        for split in reversed([*splits]):
            for record in split.records:
                for path in record.images:
                    key = _one_name(path)
                    if key not in images._number:
                        images._number[key] = len(images.paths)
                        images.paths.append(path)
                        images.split.append(split.name)
                        images.where.append(record.where)
        facts = look_at_images(images.paths, workers)
        bar = tqdm(facts, "opening images", len(images.paths), unit="image", dynamic_ncols=True)
        images.facts = list(bar)
        images.exact, images.near = copies(images.facts)
        return images

    def number(self, path: Path) -> int:
        """The number of an image, which is one for all spellings of its path."""
        return self._number[_one_name(path)]

    def same(self, path: Path) -> int:
        """The number of the first image with the same pixels."""
        number = self.number(path)
        return self.exact.get(number, number)


def _one_name(path: Path) -> str:
    """The same text for `a/../b.jpg` and `b.jpg`, and for the absolute path."""
    return str(path) if is_data_uri(path) else os.path.abspath(path)


def find(split: Split, images: Images) -> list[Finding]:
    """What is wrong with the records of a split, in their order."""
    found = [finding for n, record in enumerate(split.records) for finding in _of(n, record)]
    found += _about_images(split, images)
    found += _repeated_records(split.records, images)
    found += _repeated_answers(split.records, images)
    return sorted(dict.fromkeys(found), key=lambda finding: finding.record)


def _of(number: int, record: Record) -> list[Finding]:
    return [Finding(each.kind, number, each.detail, each.severity) for each in problems(record)]


def _about_images(split: Split, images: Images) -> list[Finding]:
    """Images that cannot be read, are blank, or are copies of others."""
    found = []
    for number, record in enumerate(split.records):
        for path in record.images:
            image = images.number(path)
            facts = images.facts[image]
            if facts.error:
                found.append(Finding("broken", number, f"{shown(path)}: {facts.error}"))
                continue
            if facts.is_blank:
                found.append(Finding("blank", number, shown(path)))
            if copy := _copy(split.name, image, images):
                found.append(copy._replace(record=number))
    return found


def _copy(split: str, image: int, images: Images) -> Finding | None:
    """The finding that an image of a split is a copy of an earlier one, if it is."""
    if images.split[image] != split:  # the very file is also in a later split
        return Finding("leaked", 0, f"{images.where[image]} has the same file", severity=2)
    earlier = images.exact.get(image, images.near.get(image))
    if earlier is None:
        return None
    is_exact = image in images.exact
    files = {images.facts[number].file_digest for number in (image, earlier)}
    how = "the same bytes" if len(files) == 1 else "the same pixels"
    how = how if is_exact else "nearly the same"
    detail = f"{how} as in {images.where[earlier]}: {shown(images.paths[earlier])}"
    if images.split[earlier] != split:
        return Finding("leaked", 0, detail, severity=float(is_exact))
    if images.facts[image].is_blank:  # all of them are alike
        return None
    return Finding("duplicates" if is_exact else "near-duplicates", 0, detail)


def _repeated_records(records: Sequence[Record], images: Images) -> list[Finding]:
    """Records that say what an earlier one says, about the same images."""
    found, first = [], dict[object, str]()
    for number, record in enumerate(records):
        pictures = tuple(images.same(path) for path in record.images)
        key = hash((pictures, record.messages, record.references, record.rejected))
        earlier = first.setdefault(key, record.where)
        if earlier != record.where:
            found.append(Finding("duplicates", number, f"says what {earlier} says"))
    return found


def _repeated_answers(records: Sequence[Record], images: Images) -> list[Finding]:
    """Long answers that are the same for many images."""
    shown_for = defaultdict[str, set[int]](set)
    for record in records:
        if record.images and size(text := answer_of(record)) >= SAME_ANSWER:
            shown_for[text].add(images.same(record.images[0]))
    most = max(SAME_IMAGES, SAME_SHARE * len(images.paths))
    many = {text: len(pictures) for text, pictures in shown_for.items() if len(pictures) >= most}
    return [
        Finding("repeated", number, f"the same for {count} images: {shorten(answer)}", count)
        for number, record in enumerate(records)
        if record.images and (count := many.get(answer := answer_of(record)))
    ]


def answer_of(record: Record) -> str:
    """The text of the last answer; "" where there is none."""
    turns = [message.text for message in record.messages if message.role == "assistant"]
    return turns[-1].strip() if turns else ""


def question_of(record: Record) -> str:
    """The text of the last question."""
    turns = [message.text for message in record.messages if message.role == "user"]
    return turns[-1].strip() if turns else ""


def most_common(texts: Iterable[str], number: int = 5) -> list[dict[str, object]]:
    """The texts that occur most often, and how often."""
    counts = Counter(filter(None, texts))
    frequent = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:number]
    return [{"text": shorten(text, 200), "count": count} for text, count in frequent]


def shown(path: Path) -> str:
    """An image's name in messages; of one within a record, its beginning."""
    return shorten(str(path), 120)


def worst(findings: Sequence[Finding], number: int) -> list[Finding]:
    """The findings to show of a kind: the most severe ones, each detail once where possible."""
    ordered = sorted(findings, key=lambda finding: (-finding.severity, finding.record))
    distinct = {finding.detail: finding for finding in reversed(ordered)}
    first = sorted(distinct.values(), key=lambda finding: (-finding.severity, finding.record))
    return first[:number]


def of_kind(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    """The findings by their kind, at most one a record in each."""
    grouped = defaultdict[str, dict[int, Finding]](dict)
    for finding in findings:
        grouped[finding.kind].setdefault(finding.record, finding)
    return {kind: list(by_record.values()) for kind, by_record in grouped.items()}


def too_long(number: int, tokens: int, reason: str) -> Finding:
    """The finding that a record has more tokens than the limit."""
    return Finding(
        "too-long", number, f"{tokens:,} tokens" + (f": {reason}" if reason else ""), tokens
    )
