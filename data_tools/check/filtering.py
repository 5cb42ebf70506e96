"""A new file of records, without those that a finding says to drop."""

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from data_tools.check.findings import Finding
from data_tools.check.reading import Split, entries_of
from data_tools.relocation import relocated
from nanovlm.data.records import record_files
from nanovlm.utils.files import to_jsonl
from nanovlm.utils.outputs import new_file

UNUSABLE = "skipped by training"


def write_kept(
    path: Path,
    split: Split,
    data: str,
    images: Path | None,
    findings: Sequence[Finding],
    kinds: Collection[str],
) -> dict[str, int]:
    """Write the records of `data` without findings of `kinds`; returns the numbers, by reason.

    A record is counted for the first of `kinds` that is found in it, as "kept", or as UNUSABLE.
    Records are as they were, but for the paths of their images where the file is in another folder.
    """
    reasons: dict[int, str] = {}
    for kind in kinds:
        for finding in findings:
            if finding.kind == kind:
                reasons.setdefault(finding.record, kind)
    records = iter(enumerate(split.records))
    following = next(records, None)
    counts = Counter(dict.fromkeys(kinds, 0))
    with new_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for source in record_files(data):
            for where, entry, folder in entries_of(source, images):
                if following is None or following[1].where != where:
                    counts[UNUSABLE] += 1
                    continue
                number, record = following
                following = next(records, None)
                counts[reasons.get(number, "kept")] += 1
                if number not in reasons:
                    kept = relocated(entry, record, folder, path.parent)
                    file.write(to_jsonl([kept]))
    return dict(counts)
