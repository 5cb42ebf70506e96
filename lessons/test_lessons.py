"""Every lesson runs, its exercises can be solved, and its notebooks are those of its source."""

import ast
import re
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from lessons.notebooks import (
    FOLDER,
    LANGUAGES,
    execute,
    exercises,
    has_tag,
    lesson_names,
    pictures,
    read_solutions,
    read_source,
)

pytestmark = pytest.mark.lessons
ROOT = FOLDER.parent
NAMES = lesson_names()
LATER = {"lora", "quantization", "moe"}  # modules of the model that a later part teaches
LINK = re.compile(r"\[[^\]]*\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)")
PACKAGE_LINE = re.compile(r"^- \[`([^`]+)`\]\(\.\./\.\./([^)]+)\)(.*)$", re.MULTILINE)


def notebook_path(name: str, language: str) -> Path:
    return FOLDER / language / f"{name}.ipynb"


def english_words(name: str) -> int:
    return len(re.findall(r"[A-Za-z0-9][\w'’.-]*", prose(name, "en")))


def chinese_characters(name: str) -> int:
    return len(re.findall(r"[\u4e00-\u9fff]", prose(name, "zh")))


def code_lines(name: str) -> list[str]:
    cells = [cell.source for cell in read_source(name).cells if cell.cell_type == "code"]
    return [line for source in cells for line in source.splitlines() if line.strip()]


def notebook(name: str, language: str) -> NotebookNode:
    return nbformat.read(notebook_path(name, language), as_version=4)


def prose(name: str, language: str) -> str:
    cells = notebook(name, language).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def printed(cell: NotebookNode) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.parametrize("name", NAMES)
def test_a_lesson_runs_and_its_exercises_can_be_solved(
    name: str, record_property: Callable[[str, object], None]
):
    started = time.perf_counter()
    ran = execute(read_source(name), read_solutions(name))
    for column, value in (  # of the table that conftest.py prints
        ("lesson", name),
        ("seconds", f"{time.perf_counter() - started:.1f}"),
        ("words", english_words(name)),
        ("characters", chinese_characters(name)),
        ("lines", len(code_lines(name))),
        ("pictures", len(pictures(notebook(name, "en")))),
        ("KB", notebook_path(name, "en").stat().st_size // 1000),
    ):
        record_property(column, value)
    solved = [cell for cell in ran.cells if has_tag(cell, "solution")]
    assert len(exercises(ran)) == len(solved) == 3
    for number, (cell, solution) in enumerate(zip(exercises(ran), solved), start=1):
        label = f"{name[:2]}.{number}"
        assert re.search(rf"^{label}  not yet", printed(cell), re.MULTILINE), printed(cell)
        assert re.search(rf"^{label}  (exact|close)", printed(solution), re.MULTILINE), (
            f"{label}: {printed(solution)}"
        )


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_that_of_its_source(name: str, language: str):
    cells = [
        cell
        for cell in read_source(name).cells
        if cell.cell_type == "code" or has_tag(cell, language)
    ]
    made = notebook(name, language)
    rebuild = f"run: python lessons/build.py {name[:2]}"
    assert [cell.source for cell in made.cells] == [cell.source for cell in cells], rebuild
    code = [cell for cell in made.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), rebuild
    assert 4 <= len(pictures(made)) <= 7, "the strip, and three to six pictures"
    size = notebook_path(name, language).stat().st_size
    assert size <= 150_000, f"{size} bytes"


@pytest.mark.parametrize("name", NAMES)
def test_twins_have_the_same_code_and_outputs(name: str):
    first, second = (
        [
            (cell.source, cell.outputs)
            for cell in notebook(name, language).cells
            if "outputs" in cell
        ]
        for language in LANGUAGES
    )
    assert first == second


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_of_prose_has_a_language_and_a_twin(name: str):
    kinds = [
        "code" if cell.cell_type == "code" else "".join(cell.metadata.get("tags", ["?"]))
        for cell in read_source(name).cells
    ]
    assert "?" not in kinds and kinds.count("zh") == kinds.count("en")


@pytest.mark.parametrize("name", NAMES)
def test_a_lesson_has_the_length_of_a_lesson(name: str):
    english, chinese, code = english_words(name), chinese_characters(name), code_lines(name)
    assert 1200 <= english <= 2500, f"{english} English words"
    assert 2000 <= chinese <= 4500, f"{chinese} Chinese characters"
    assert 100 <= len(code) <= 250, f"{len(code)} lines of code"
    assert max(map(len, code)) <= 100


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files_and_symbols(name: str, language: str):
    text = prose(name, language)
    for target in LINK.findall(text):
        assert (FOLDER / language / target).exists(), target
    named = PACKAGE_LINE.findall(text)
    assert len(named) >= 2, "a lesson names what to read in the package"
    for shown, target, rest in named:
        assert shown == target
        if target.endswith(".py"):
            symbols = re.findall(r"`([A-Za-z_][\w.]*)`", rest.split("：")[0].split(":")[0])
            assert symbols, f"{target}: no symbol is named"
            missing = [symbol for symbol in symbols if symbol not in symbols_of(ROOT / target)]
            assert not missing, f"{target} has no {missing}"


@pytest.mark.parametrize("name", NAMES)
def test_the_list_of_lessons_has_their_titles(name: str):
    for language, page in zip(LANGUAGES, ("README.zh-CN.md", "README.md"), strict=True):
        listed = (FOLDER / page).read_text(encoding="utf-8")
        found = re.search(rf"\[([^\]]+)\]\({language}/{name}\.ipynb\)", listed)
        title = prose(name, language).splitlines()[0]
        assert found and title.startswith(f"# {name[:2]} · {found[1]}"), title


def symbols_of(path: Path) -> set[str]:
    """The names a module defines: functions, classes, their methods, and constants."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            members = [item for item in node.body if isinstance(item, ast.FunctionDef)]
            found |= {f"{node.name}.{item.name}" for item in members}
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_every_module_of_the_model_is_taught():
    linked = {target for name in NAMES for _, target, _ in PACKAGE_LINE.findall(prose(name, "en"))}
    modules = (ROOT / "nanovlm" / "model").glob("[a-z]*.py")
    taught = {path.relative_to(ROOT).as_posix() for path in modules if path.stem not in LATER}
    assert taught <= linked, f"no lesson links {taught - linked}"


def test_every_module_that_is_taught_names_its_lesson():
    linked = {
        (target, name) for name in NAMES for _, target, _ in PACKAGE_LINE.findall(prose(name, "en"))
    }
    for module in sorted({target for target, _ in linked if re.match(r"nanovlm/.*\.py$", target)}):
        lessons = {name for target, name in linked if target == module}
        text = (ROOT / module).read_text(encoding="utf-8")
        docstring = ast.get_docstring(ast.parse(text)) or ""
        named = set(re.findall(r"lessons/source/(\w+)\.py", docstring))
        assert named and named <= set(NAMES), f"{module}: its docstring names no lesson"
        assert named <= lessons, f"{module} names {named - lessons}, which do not link back"
