"""What there is to read: the README and the pages of docs/, each in English and in Chinese."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
README = ("README.md", "README.zh-CN.md")
ENGLISH = {path.name for path in (REPOSITORY / "docs" / "en").iterdir()}
TWINS = [README, *((f"docs/en/{name}", f"docs/zh/{name}") for name in sorted(ENGLISH))]
PAGES = [page for twins in TWINS for page in twins]
ASSETS = "nanovlm/assets/README.md"  # both languages in one file
TEXTS = {page: (REPOSITORY / page).read_text(encoding="utf-8") for page in [*PAGES, ASSETS]}


def code_blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """`text` without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def code_spans(text: str) -> list[str]:
    """What stands between single backticks, outside the fenced blocks."""
    return re.findall(r"`([^`\n]+)`", prose(text))


def anchors(text: str) -> set[str]:
    """The fragments of a page: those a code host gives its headings, and its own `<a id="…">`."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    own = set(re.findall(r'<a id="([^"]+)"></a>', text))
    return own | {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings
    }
