"""One HTML page that needs no other file and loads nothing: thumbnails are in it as `data:` URIs.

Its policy (Content-Security-Policy) lets a browser load nothing else and run no script but the
page's own. All text from records and answers is escaped.
"""

import base64
import hashlib
import io
from collections.abc import Iterable
from html import escape
from pathlib import Path

from PIL import Image

from nanovlm.errors import NanoVLMError
from nanovlm.inputs.image import open_image, resized_within

TEXT_SHOWN = 600  # characters of one text

STYLE = """
:root { color-scheme: light dark; --line: #d0d7de; --faint: #59636e; --mark: #9a6700; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3d444d; --faint: #9198a1; --mark: #d29922; }
}
body { font: 15px/1.5 system-ui, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif;
  max-width: 76rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 0.2rem; }
h2 small, p.what, .where { color: var(--faint); font-weight: normal; }
p.what { margin: 0 0 0.8rem; }
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


def write_page(
    path: Path, title: str, body: Iterable[str], *, style: str = "", script: str = ""
) -> None:
    """Write the page: `title` is text, the pieces of `body` are HTML and are written one by one."""
    style = STYLE + style
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
    with open(path, "w", encoding="utf-8", errors="replace", newline="\n") as file:
        file.write(
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{shown(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
            f"<h1>{shown(title)}</h1>\n"
        )
        for piece in body:
            file.write(piece)
        file.write(f"<script>{script}</script>\n" if script else "")
        file.write("</body>\n</html>\n")


def shown(text: str) -> str:
    """`text` as HTML, cut after TEXT_SHOWN characters; what cannot be printed is marked."""
    text = text.strip()
    text = text if len(text) <= TEXT_SHOWN else text[:TEXT_SHOWN] + "…"
    visible = (letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)
    return escape("".join(visible))


def thumbnail(path: Path, side: int) -> str:
    """An image as `<img>`, with at most `side` pixels a side; "" if it cannot be read."""
    try:
        image = open_image(path)
    except NanoVLMError:
        return ""
    data = io.BytesIO()
    resized_within(image, side, Image.Resampling.LANCZOS).save(data, "JPEG", quality=80)
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{encoded}">'
