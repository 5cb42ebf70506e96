"""Lesson sources → executed notebooks in Chinese and English.

A source is one Python file, `source/NN_name.py`, in jupytext's percent format. Its Markdown cells
carry the tag `zh` or `en`, its code cells are shared. A code cell tagged `exercise` is one of the
lesson's three exercises; `solutions/NN.py` holds a cell for each, in the same order. A code cell
tagged `time` prints what differs from run to run.
"""

import ast
import base64
import io
import os
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

FOLDER = Path(__file__).resolve().parent
LANGUAGES = ("zh", "en")
COLOURS = 96  # of a picture in a notebook, which keeps its file small
TIMEOUT = 600  # seconds for one cell


def lesson_names() -> list[str]:
    """The names of all lessons in order, such as "01_patches"."""
    return sorted(path.stem for path in (FOLDER / "source").glob("[0-9][0-9]_*.py"))


def read_source(name: str) -> NotebookNode:
    """The source of a lesson, with Markdown cells of both languages."""
    return jupytext.read(FOLDER / "source" / f"{name}.py")


def read_solutions(name: str) -> list[str]:
    """The code that solves each exercise of a lesson, in order."""
    cells = jupytext.read(FOLDER / "solutions" / f"{name[:2]}.py").cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    return [source for source in code if ast.parse(source).body]  # not the comment at the top


def has_tag(cell: NotebookNode, tag: str) -> bool:
    """Whether a cell of a source carries `tag`."""
    return tag in cell.metadata.get("tags", [])


def execute(source: NotebookNode, solutions: list[str] | None = None) -> NotebookNode:
    """Run the code cells of a source, in one process, and return it with their outputs.

    With `solutions`, each exercise is followed by a cell, tagged `solution`, that solves it.
    """
    notebook = nbformat.from_dict(source)
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(exercises(notebook) if solutions is not None else []):
        place = next(index for index, other in enumerate(notebook.cells) if other is cell)
        solved = nbformat.v4.new_code_cell(solutions[number], metadata={"tags": ["solution"]})
        notebook.cells.insert(place + 1, solved)
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python"}
    environment = {**os.environ, "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER / "en")}},
    )
    client.execute(env=environment)
    return notebook


def exercises(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells that are exercises."""
    return [cell for cell in notebook.cells if has_tag(cell, "exercise")]


def in_language(source: NotebookNode, executed: NotebookNode, language: str) -> NotebookNode:
    """One language's notebook: its own Markdown cells, and the shared code with its outputs."""
    code = iter(executed.cells)
    cells = []
    for cell in source.cells:
        if cell.cell_type == "code":
            ran = next(code)
            made = nbformat.v4.new_code_cell(ran.source, execution_count=ran.execution_count)
            made.outputs = [_tidy(output) for output in _joined(ran.outputs)]
        elif has_tag(cell, language):
            made = nbformat.v4.new_markdown_cell(cell.source)
        else:
            continue
        if has_tag(cell, "time"):
            made.metadata["tags"] = ["time"]
        made["id"] = f"{language}-{len(cells):03}"
        cells.append(made)
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def write(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook; the same notebook gives the same bytes."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


def pictures(notebook: NotebookNode) -> list[bytes]:
    """The PNG files among the outputs."""
    return [
        base64.b64decode(output["data"]["image/png"])
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Outputs with neighbouring pieces of one stream joined: how they are cut is chance."""
    joined: list[NotebookNode] = []
    for output in outputs:
        last = joined[-1] if joined else None
        streams = last is not None and output.output_type == last.output_type == "stream"
        if streams and output.name == last.name:
            last.text += output.text
            continue
        joined.append(nbformat.from_dict(output))
    return joined


def _tidy(output: NotebookNode) -> NotebookNode:
    """An output without what a reader does not see: pictures in few colours, no size in text."""
    data = output.get("data")
    if data and "image/png" in data:
        picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
        small = io.BytesIO()
        # Not median cut, which turns a small orange triangle brown.
        few = picture.quantize(
            COLOURS, method=Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE
        )
        few.save(small, format="PNG", optimize=True)
        encoded = base64.b64encode(small.getvalue()).decode("ascii")
        output["data"] = {"image/png": encoded}
        output["metadata"] = {}
    return output
