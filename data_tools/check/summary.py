"""What was found, in numbers: an object for `report.json`, and lines to read."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from data_tools.check.findings import KINDS, Finding
from data_tools.check.lengths import percentiles
from data_tools.check.looking import Images, answer_of, most_common, of_kind, question_of, worst
from data_tools.check.reading import Split, reason_of
from data_tools.check.texts import language, shorten
from nanovlm.data.records import are_too_many

EXAMPLES = 5  # of each finding in report.json
LANGUAGES = ("Chinese", "English", "mixed", "other", "none")


def summarise_split(split: Split, images: Images, findings: Sequence[Finding]) -> dict[str, Any]:
    """The numbers of the records of one flag."""
    records = split.records
    numbers = {images.number(path) for record in records for path in record.images}
    facts = [images.facts[number] for number in numbers]
    readable = [image for image in facts if not image.error]
    answers = [answer_of(record) for record in records]
    total = len(records) + len(split.skipped)
    return {
        "records": total,
        "usable": len(records),
        "skipped": len(split.skipped),
        "skipped_for": _reasons(split.skipped),
        "training_stops": are_too_many(split.skipped, total),
        "without_image": sum(not record.images for record in records),
        "turns": sum(len(record.messages) for record in records),
        "answers": sum(m.role == "assistant" for record in records for m in record.messages),
        "languages": _languages(split),
        "images": {
            "files": len(facts),
            "broken": len(facts) - len(readable),
            "formats": dict(sorted(Counter(image.format for image in readable).items())),
            "width": percentiles(sorted(image.width for image in readable)),
            "height": percentiles(sorted(image.height for image in readable)),
        },
        "most_common_questions": most_common(map(question_of, records)),
        "most_common_answers": most_common(answers),
        "distinct_answers": len(set(answers)),
        "findings": _findings(split, findings),
    }


def _languages(split: Split) -> dict[str, int]:
    counts = Counter(
        language(" ".join(message.text for message in record.messages if message.role != "system"))
        for record in split.records
    )
    return {name: counts[name] for name in LANGUAGES if counts[name]}


def _reasons(skipped: Sequence[str]) -> list[dict[str, Any]]:
    """Why records are skipped: each reason with its number and its first record."""
    first: dict[str, str] = {}
    for line in skipped:
        first.setdefault(reason_of(line), line)
    counts = Counter(map(reason_of, skipped))
    return [
        {"reason": reason, "records": number, "example": first[reason]}
        for reason, number in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def _findings(split: Split, findings: Sequence[Finding]) -> dict[str, Any]:
    grouped = of_kind(findings)
    return {
        kind: {
            "records": len(grouped[kind]),
            "examples": [
                {"where": split.records[found.record].where, "detail": found.detail}
                for found in worst(grouped[kind], EXAMPLES)
            ],
        }
        for kind in KINDS
        if kind in grouped
    }


def readable(report: Mapping[str, Any]) -> list[str]:
    """The lines that the command prints."""
    lines = []
    for name, split in report["splits"].items():
        lines += ["", f"{name}: {report['inputs'][name]}", *_lines_of_split(split)]
    if lengths := report.get("lengths"):
        lines += ["", *_lines_of_lengths(lengths)]
    return lines[1:]


def _lines_of_split(split: Mapping[str, Any]) -> list[str]:
    images = split["images"]
    total = max(split["usable"], 1)
    languages = (f"{name} {n:,} ({n / total:.1%})" for name, n in split["languages"].items())
    formats = (f"{name} {number:,}" for name, number in images["formats"].items())
    broken = f"; {images['broken']:,} cannot be read" if images["broken"] else ""
    without = f"; {split['without_image']:,} without an image" if split["without_image"] else ""
    different = f"{split['distinct_answers']:,} different last ones"
    lost = split["findings"].get("broken", {}).get("records", 0)
    lines = [
        f"  records    {split['records']:,}, training can use {split['usable'] - lost:,}{without}",
        f"  turns      {split['turns']:,}, of which {split['answers']:,} answers, {different}",
        f"  languages  {', '.join(languages) or 'none'}",
        f"  images     {images['files']:,} files: {', '.join(formats) or 'none'}{broken}",
    ]
    if images["width"]:
        sizes = (
            f"{images['width'][share]:,} × {images['height'][share]:,}"
            for share in ("p0", "p50", "p100")
        )
        lines.append("  pixels     smallest {}, median {}, largest {}".format(*sizes))
    for what in ("questions", "answers"):
        common = split[f"most_common_{what}"][:3]
        shares = (f"{shorten(each['text'])} ({each['count'] / total:.1%})" for each in common)
        lines.append(f"  {what:<9}  most common: {' | '.join(shares) or 'none'}")
    for each in split["skipped_for"]:
        lines.append(f"  skipped    {each['records']:,}: {each['reason']}")
        lines.append(f"             {each['example']}")
    if split["training_stops"]:
        lines.append("  skipped    so many that training would stop; mend or remove them")
    for kind, found in split["findings"].items():
        share = found["records"] / total
        lines.append(f"  {kind:<15}  {found['records']:,} ({share:.2%}): {KINDS[kind]}")
        lines += [f"      {each['where']}: {each['detail']}" for each in found["examples"][:2]]
    if not split["findings"]:
        lines.append("  no findings")
    return lines


def _lines_of_lengths(lengths: Mapping[str, Any]) -> list[str]:
    lines = [f"tokens of a record, with {lengths['of']}"]
    for name, what in (("tokens", "record"), ("answer_tokens", "answers")):
        if values := lengths[name]:
            shares = (f"{share} {values[share]:,}" for share in ("p5", "p50", "p95", "p99", "p100"))
            lines.append(f"  {what:<8}  {', '.join(shares)}, mean {values['mean']:.1f}")
    lines.append(
        f"  --max-length {lengths['max_length']:,} cuts {lengths['cut_records']:,} records and "
        f"skips {lengths['skipped_records']:,}; {lengths['lost_answer_tokens']:,} answer tokens "
        f"({lengths['lost_answer_share']:.2%}) are lost"
    )
    if padding := lengths["padding"]:
        lines.append(
            f"  padding: {padding['plain']:.1%} in batches of 32, {padding['bucket']:.1%} with "
            f"--bucket 32, {padding['pack']:.1%} with --pack {lengths['max_length']:,} --bucket 32"
        )
    return lines
