"""lessons/TERMINOLOGY.md is the one term list: what it rules out is said nowhere."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
TERMINOLOGY = REPOSITORY / "lessons" / "TERMINOLOGY.md"
PAGES = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for pattern in ("*.zh-CN.md", "docs/zh/*.md", "lessons/*.zh-CN.md", "lessons/source/*.py")
    for path in REPOSITORY.glob(pattern)
)
CHINESE_CELL = re.compile(r'^# %% \[markdown\] tags=\["zh"\]\n(.*?)(?=^# %%|\Z)', re.M | re.S)
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TERMINOLOGY.read_text(encoding="utf-8").splitlines()
    if line.startswith("|") and not line.startswith(("|---", "| English"))
]
RULED_OUT = {unwanted: row[1] for row in ROWS for unwanted in row[3].split("、") if unwanted}


def chinese(page: str) -> str:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    return "".join(CHINESE_CELL.findall(text)) if page.endswith(".py") else text


def test_a_term_is_listed_once_and_never_ruled_out():
    terms = [row[1] for row in ROWS]
    assert len(terms) == len(set(terms)) >= 100
    assert not set(terms) & set(RULED_OUT)
    assert all(len(row) == 4 and all(row[:3]) for row in ROWS)


@pytest.mark.parametrize("page", PAGES)
def test_only_the_listed_terms_are_used(page: str):
    text = chinese(page)
    assert len(text) > 500
    assert not {word: term for word, term in RULED_OUT.items() if word in text}
