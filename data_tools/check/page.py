"""One HTML page with the numbers and the worst examples of each finding.

It needs no other file and loads nothing: thumbnails are in it as `data:` URIs, and it has no
script. All text of the data is escaped.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from data_tools.check.findings import KINDS, Finding
from data_tools.check.looking import Images, of_kind, worst
from data_tools.check.reading import Split
from data_tools.check.summary import readable
from nanovlm.data.records import Record
from nanovlm.errors import NanoVLMError
from nanovlm.inputs.image import open_image

EXAMPLES = 12  # of each finding
SIDE = 200  # pixels of a thumbnail's longer side
IMAGES_SHOWN = 4  # of a record
TEXT_SHOWN = 600  # characters of a turn
TURNS_SHOWN = 6  # the last ones of a record

STYLE = """
:root { color-scheme: light dark; --line: #d0d7de; --faint: #59636e; --mark: #9a6700; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3d444d; --faint: #9198a1; --mark: #d29922; }
}
body { font: 15px/1.5 system-ui, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif;
  max-width: 76rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 0.2rem; }
h2 small, p.what, .where { color: var(--faint); font-weight: normal; }
p.what { margin: 0 0 0.8rem; }
pre { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; padding: 0.8rem;
  font: 13px/1.5 ui-monospace, "Cascadia Mono", Menlo, "Noto Sans Mono CJK SC", monospace; }
nav a { margin-right: 0.9rem; white-space: nowrap; }
.cards { display: grid; gap: 0.8rem;
  grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); }
.card { border: 1px solid var(--line); border-radius: 6px; padding: 0.7rem;
  overflow-wrap: anywhere; }
.card img { max-width: 47%; max-height: 12.5rem; margin: 0 0.4rem 0.4rem 0; border-radius: 4px;
  outline: 1px solid var(--line); }
.where { font-size: 0.8rem; } .detail { color: var(--mark); margin: 0.2rem 0 0.5rem; }
.turn { margin: 0.3rem 0; white-space: pre-wrap; }
.turn b { color: var(--faint); font-weight: 600; }
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
    title = escape(f"Check of {report['inputs']['data']}")
    with open(path, "w", encoding="utf-8", errors="replace", newline="\n") as file:
        file.write(
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
            f"<pre>{escape(chr(10).join(readable(report)))}</pre>\n"
            f"<nav>{' '.join(links) or 'No findings.'}</nav>\n"
        )
        for section in sections:
            file.write(section)
        file.write("</body>\n</html>\n")


def _section(anchor: str, split: Split, kind: str, found: Sequence[Finding], images: Images) -> str:
    shown = worst(found, EXAMPLES)
    cards = "\n".join(_card(split.records[each.record], each, images) for each in shown)
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
    shown = "".join(map(_thumbnail, dict.fromkeys(pictures)))
    turns = "".join(
        f'<div class="turn"><b>{message.role}</b> {_text(message.text)}</div>'
        for message in record.messages[-TURNS_SHOWN:]
    )
    return (
        f'<div class="card">{shown}<div class="where">{escape(record.where)}</div>'
        f'<div class="detail">{_text(finding.detail)}</div>{turns}</div>'
    )


def _text(text: str) -> str:
    text = text.strip()
    text = text if len(text) <= TEXT_SHOWN else text[:TEXT_SHOWN] + "…"
    visible = (letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)
    return escape("".join(visible))


def _thumbnail(path: Path) -> str:
    try:
        image = open_image(path)
    except NanoVLMError:
        return ""
    data = io.BytesIO()
    ImageOps.contain(image, (SIDE, SIDE), Image.Resampling.LANCZOS).save(data, "JPEG", quality=80)
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{encoded}">'
