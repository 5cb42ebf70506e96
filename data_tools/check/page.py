"""One HTML page with the numbers and the worst examples of each finding.

It has no script (`nanovlm/evaluation/page.py`).
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from data_tools.check.findings import KINDS, Finding
from data_tools.check.looking import Images, of_kind, worst
from data_tools.check.reading import Split
from data_tools.check.summary import readable
from nanovlm.data.records import Record
from nanovlm.evaluation.page import shown, thumbnail, write_page

EXAMPLES = 12  # of each finding
SIDE = 200  # pixels of a thumbnail's longer side
IMAGES_SHOWN = 4  # of a record
TURNS_SHOWN = 6  # the last ones of a record

STYLE = """
pre { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; padding: 0.8rem;
  font: 13px/1.5 ui-monospace, "Cascadia Mono", Menlo, "Noto Sans Mono CJK SC", monospace; }
nav a { margin-right: 0.9rem; white-space: nowrap; }
"""


def draw_page(
    path: Path,
    report: Mapping[str, Any],
    findings: Mapping[str, Sequence[Finding]],
    splits: Sequence[Split],
    images: Images,
) -> None:
    """Write the page; `findings` are those of each split."""
    grouped = {split.name: of_kind(findings[split.name]) for split in splits}
    sections, links = [], []
    for split in splits:
        for kind in KINDS:
            if found := grouped[split.name].get(kind):
                anchor = f"{split.name}-{kind}"
                links.append(f'<a href="#{anchor}">{split.name}: {kind} ({len(found):,})</a>')
                sections.append(_section(anchor, split, kind, found, images))
    numbers = escape(chr(10).join(readable(report)))
    head = f"<pre>{numbers}</pre>\n<nav>{' '.join(links) or 'No findings.'}</nav>\n"
    write_page(path, f"Check of {report['inputs']['data']}", [head, *sections], style=STYLE)


def _section(anchor: str, split: Split, kind: str, found: Sequence[Finding], images: Images) -> str:
    examples = worst(found, EXAMPLES)
    cards = "\n".join(_card(split.records[each.record], each, images) for each in examples)
    number = f"{len(found):,} of {len(split.records):,} records of {split.name}"
    return (
        f'<h2 id="{anchor}">{kind} <small>{number}</small></h2>\n'
        f'<p class="what">{escape(KINDS[kind])}</p>\n<div class="cards">\n{cards}\n</div>\n'
    )


def _card(record: Record, finding: Finding, images: Images) -> str:
    """A record with its place, the finding, its images, and what an image is a copy of."""
    pictures = [*record.images[:IMAGES_SHOWN]]
    for path in record.images[:IMAGES_SHOWN]:
        number = images.number(path)
        if (earlier := images.exact.get(number, images.near.get(number))) is not None:
            pictures.append(images.paths[earlier])
    images_shown = "".join(thumbnail(path, SIDE) for path in dict.fromkeys(pictures))
    turns = "".join(
        f'<div class="turn"><b>{message.role}</b> {shown(message.text)}</div>'
        for message in record.messages[-TURNS_SHOWN:]
    )
    return (
        f'<div class="card">{images_shown}<div class="where">{escape(record.where)}</div>'
        f'<div class="detail">{shown(finding.detail)}</div>{turns}</div>'
    )
