"""The layout of the package: imports go from higher layers to lower ones only, and no folder holds
too many files."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nanovlm"
# From the top. A module imports from its own folder and from lower layers.
LAYERS = (
    ("report", "bench", "serve", "export"),
    ("memory",),  # bench estimates the time of the step that it simulates
    ("training",),
    ("evaluation", "explain"),  # training shows sample answers with their metrics
    ("engine",),
    ("data", "generate"),
    ("beams", "sampling"),
    ("hub",),
    ("model",),
    ("inputs",),
    ("tokenizer",),
    ("utils",),
    ("errors",),
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def component(path: Path) -> str:
    """`nanovlm/model/vlm.py` → `model`, `nanovlm/generate.py` → `generate`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, also within functions."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    found = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(str(node.module))
            if node.module == "nanovlm":
                found |= {f"nanovlm.{name.name}" for name in node.names}
    return {name for name in found if name.startswith("nanovlm.")}


def test_every_module_belongs_to_a_layer():
    assert {component(path) for path in modules()} == set(LAYER)


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_to_lower_layers_only(path: Path):
    importing, upwards = component(path), set()
    for module in imports(path):
        imported = module.split(".")[1]
        if imported != importing and LAYER[imported] <= LAYER[importing]:
            upwards.add(module)
    assert not upwards


def test_there_is_no_import_cycle():
    graph = {}
    for path in modules():
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        graph[name] = imports(path) - {name}
    while leaves := [name for name, imported in graph.items() if not imported & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph


def test_no_folder_has_too_many_files():
    assert len([path for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]) <= 6
    for folder in (path for path in PACKAGE.rglob("*") if path.is_dir()):
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= 12, folder


def test_the_model_package_uses_neither_files_nor_flags():
    for path in (PACKAGE / "model").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not any(word in text for word in ("argparse", "import os", "pathlib", "open(")), path
