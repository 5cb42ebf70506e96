"""Compare runs: their curves in one figure, and Markdown tables of settings and results.

    python -m nanovlm.report runs/a runs/b [--out report.png]

The tables go to stdout. A run that is still going on is compared as far as it is.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from nanovlm.errors import NanoVLMError
from nanovlm.training.monitor.log import read_log, series
from nanovlm.training.presets import read_tables
from nanovlm.training.settings import Settings
from nanovlm.utils.console import run_command, say
from nanovlm.utils.figures import plt, save_figure
from nanovlm.utils.outputs import check_new_file, new_file
from nanovlm.utils.parser import CommandParser

FINAL_LINES = 5  # log lines whose mean is the final loss; a single one is noisy
# Means over a run's lines.
SHARES = {"data_wait": "waiting for data", "fill": "rows filled", "mfu": "of peak arithmetic"}
# Of preference training.
HELD_OUT = {"accuracy": ("held-out pairs right", ".1%"), "margin": ("held-out margin", ".2f")}
PANELS = (
    ("loss", "training loss per labelled token, or pair"),
    ("val_loss", "validation loss per labelled token, or pair"),
    ("lr", "learning rate"),
    ("tokens_per_second", "tokens per second"),
)


@dataclass
class Run:
    """A run folder: its name in the comparison, its settings, and the numbers of its log lines."""

    name: str
    settings: dict[str, Any]
    lines: list[dict[str, float]]


def main() -> None:
    """Read the runs, draw, print."""
    summary_line = "Compare runs: curves in one figure, tables of settings and results."
    parser = CommandParser(prog="python -m nanovlm.report", description=summary_line)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run folder, such as runs/stage2"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("report.png"),
        metavar="FILE.png",
        help="default: report.png",
    )
    arguments = parser.parse_args()
    check_new_file(arguments.out, "--out", arguments.runs)
    runs = [read_run(folder, name) for folder, name in zip(arguments.runs, _names(arguments.runs))]
    with new_file(arguments.out) as figure:
        draw(runs, figure)
    say(f"the curves are in {arguments.out}")
    print(summary(runs))
    if differing := differences(runs):
        print("\nSettings that differ:\n\n" + differing)


def read_run(folder: Path, name: str) -> Run:
    """A run folder as it is now; what is damaged in it is reported on stderr and left out."""
    metrics, toml = folder / "metrics.jsonl", folder / "settings.toml"
    if not metrics.is_file() and not toml.is_file():
        raise NanoVLMError(
            f"{folder}: holds no run (neither metrics.jsonl nor settings.toml); "
            "name the folder of a run"
        )
    settings = dataclasses.asdict(Settings())  # a setting that is newer than the run: its default
    try:
        settings |= read_tables(toml)
    except NanoVLMError as error:
        say(f"{error}; the settings of {name} are left out")
        settings = {}
    lines = [
        {key: value for key, value in line.items() if value is not None}
        for line in read_log(metrics)
    ]
    if not lines:
        say(f"{metrics}: holds no line yet")
    return Run(name, settings, lines)


def summary(runs: list[Run]) -> str:
    """A Markdown table with one row per run.

    What no run has logged gets no column; what one run has not logged gets a dash.
    """
    rows = [_row(run) for run in runs]
    columns = [column for column in rows[0] if any(row[column] != "–" for row in rows)]
    return _table(columns, [[row[column] for column in columns] for row in rows])


def differences(runs: list[Run]) -> str:
    """A Markdown table of the settings that differ between runs; "" if none but the folder do."""
    known = [run for run in runs if run.settings]
    names = dict.fromkeys(name for run in known for name in run.settings)
    names = [name for name in names if name not in ("out", "resume")]
    rows = [[name, *(_as_json(run.settings.get(name)) for run in known)] for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    return _table(["setting", *(run.name for run in known)], rows) if rows else ""


def draw(runs: list[Run], path: Path) -> None:
    """Losses (training: as logged, faint, and smoothed), learning rate and speed over the steps.

    Each run has one colour.
    """
    colours = plt.get_cmap("tab10")(range(10))
    if len(runs) > len(colours):
        colours = plt.get_cmap("turbo")(np.linspace(0.05, 0.95, len(runs)))
    with plt.rc_context({"text.parse_math": False}):
        figure, grid = plt.subplots(2, 2, figsize=(13, 8), layout="constrained")
        for axes, (key, title) in zip(grid.flat, PANELS):
            for run, colour in zip(runs, colours):
                _draw_curve(axes, run, key, colour)
            _finish_panel(axes, key, title, runs)
        handles = [
            Line2D([], [], color=colour, linewidth=3, label=run.name)
            for run, colour in zip(runs, colours)
        ]
        columns = min(len(runs), 4)
        figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)
        save_figure(figure, path)


def smooth(values: list[float]) -> np.ndarray:
    """The mean over a twenty-fifth of the curve around each point, and over less at its ends."""
    if not values:
        return np.array([])
    window = np.ones(min(len(values) // 25 | 1, len(values)))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _draw_curve(axes: Axes, run: Run, key: str, colour: Any) -> None:
    steps, values = series(run.lines, key)
    if key == "loss":
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        axes.plot(steps, smooth(values), color=colour)
    else:
        marks = "o-" if key == "val_loss" else "-"
        axes.plot(steps, values, marks, color=colour, markersize=4, linewidth=1.5)


def _finish_panel(axes: Axes, key: str, title: str, runs: list[Run]) -> None:
    values = [value for run in runs for value in series(run.lines, key)[1]]
    end = max((line["step"] for run in runs for line in run.lines), default=1)
    axes.set(title=title, xlabel="optimizer step", xlim=(0, end * 1.03))
    axes.grid(alpha=0.3)
    if not values:
        axes.text(0.5, 0.5, "not logged", ha="center", color="grey", transform=axes.transAxes)
    elif key.endswith("loss") and min(values) > 0 and max(values) / min(values) > 10:
        axes.set(yscale="log", title=f"{title}, logarithmic")
        axes.yaxis.set(
            major_locator=LogLocator(subs=(1, 2, 5)),
            major_formatter=StrMethodFormatter("{x:g}"),
            minor_formatter=NullFormatter(),
        )
    elif not key.endswith("loss"):
        axes.set_ylim(bottom=0)


def _row(run: Run) -> dict[str, str]:
    def last(key: str) -> float | None:
        return next((line[key] for line in reversed(run.lines) if key in line), None)

    def values(key: str) -> list[float]:
        return series(run.lines, key)[1]

    def show(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    def mean(numbers: list[float]) -> float | None:
        return sum(numbers) / len(numbers) if numbers else None

    seconds, samples = last("seconds"), last("samples")
    best = min(
        (line for line in run.lines if "val_loss" in line),
        key=lambda line: line["val_loss"],
        default=None,
    )
    return {
        "run": run.name,
        "trained": _trained(run.settings),
        "steps": show(last("step"), ",.0f"),
        "samples": show(samples, ",.0f"),
        "tokens": show(last("tokens"), ",.0f"),
        "minutes": show(seconds / 60 if seconds else None, ",.1f"),
        "samples/s": show(samples / seconds if samples and seconds else None, ",.1f"),
        f"loss, last {FINAL_LINES} lines": show(mean(values("loss")[-FINAL_LINES:]), ".4f"),
        "best val loss": f"{best['val_loss']:.4f} at step {best['step']:,}" if best else "–",
        **{title: show(last(f"val_{key}"), form) for key, (title, form) in HELD_OUT.items()},
        "peak memory, GB": show(max(values("peak_memory_gb"), default=None), ".2f"),
        **{title: show(mean(values(key)), ".1%") for key, title in SHARES.items()},
    }


def _trained(settings: dict[str, Any]) -> str:
    """The parts that a run trains, with LoRA's rank or the number of blocks."""
    parts = []
    for part in map(str.strip, str(settings.get("train", "–")).split(",")):
        blocks = settings.get(f"{part}_layers", 0)
        rank = settings.get("lora_rank", 0) if part == "language_model" else 0
        detail = f" (LoRA rank {rank})" if rank else f" (top {blocks})" if blocks else ""
        parts.append(part + detail)
    return ", ".join(parts)


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)  # TOML has dates as well


def _names(folders: list[Path]) -> list[str]:
    """The folders' names; where two are alike, their paths."""
    short = [folder.resolve().name for folder in folders]
    return [name if short.count(name) == 1 else str(folder) for name, folder in zip(short, folders)]


def _table(header: list[str], rows: list[list[str]]) -> str:
    escaped = [
        [cell.replace("|", "\\|") for cell in line]
        for line in (header, ["---"] * len(header), *rows)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


if __name__ == "__main__":
    run_command(main)
