"""The layout of the package: imports run downwards only, and no folder holds too much to find one's
way."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nanovlm"
FLOORS = (  # from the top; a module imports from its own folder and from the floors below
    ("report", "memory", "bench"),
    ("training",),
    ("evaluation",),  # training shows sample answers with their metrics
    ("data", "generate"),
    ("hub",),
    ("model",),
    ("inputs",),
    ("tokenizer",),
    ("utils",),
    ("errors",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def room_of(module: str) -> str:
    """`nanovlm.model.vlm` → `model`."""
    return module.split(".")[1]


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, also within functions."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    found = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(str(node.module))
            if node.module == "nanovlm":
                found |= {f"nanovlm.{a.name}" for a in node.names}
    return {name for name in found if name.startswith("nanovlm.")}


def test_every_module_has_a_floor():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in modules()}
    assert rooms == set(FLOOR)


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_run_downwards(path: Path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    upwards = {
        name
        for name in imports(path)
        if room_of(name) != room and FLOOR[room_of(name)] <= FLOOR[room]
    }
    assert not upwards


def test_there_is_no_circle_of_modules():
    graph = {}
    for path in modules():
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        graph[name] = imports(path) - {name}
    while leaves := [name for name, needed in graph.items() if not needed & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph


def test_a_folder_fits_a_glance():
    assert len([path for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]) <= 6
    for folder in (path for path in PACKAGE.rglob("*") if path.is_dir()):
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= 12, folder


def test_the_model_knows_neither_files_nor_flags():
    for path in (PACKAGE / "model").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not any(word in text for word in ("argparse", "import os", "pathlib", "open(")), path
