"""What a run leaves to look at: metrics.jsonl, curves.png, and a few images with the model's answers."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import font_manager

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)

from nanovlm.device import peak_memory  # noqa: E402
from nanovlm.files import atomic_path, read_lines, write_atomically

logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # a font without a normal weight will do
DRAW_EVERY = 30.0  # seconds between redrawings of the curves
WIDE = 0x2E7F  # code points above it are Chinese, Japanese or Korean, for what is drawn here


class RunLog:
    """Appends to `metrics.jsonl` and redraws `curves.png`. A resumed run drops the lines after its checkpoint, which
    it is going to write again."""

    def __init__(self, run: Path, start_step: int, device: torch.device) -> None:
        self.run, self.path, self.device = run, run / "metrics.jsonl", device
        self.lines: list[dict[str, Any]] = []
        if self.path.exists():
            self.lines = [line for line in read_lines(self.path) if line["step"] <= start_step]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
        self._start = time.perf_counter() - max((line["seconds"] for line in self.lines), default=0.0)
        self._last = self.lines[-1] if self.lines else {}
        self._last_time = self._drawn = time.perf_counter()
        self._waited = 0.0  # seconds for data, since the last line

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the time spent inside towards `data_wait`, a share of all time."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def write(self, line: dict[str, Any]) -> dict[str, float]:
        """Append one line and return the speed since the one before: samples, tokens and images a second.

        Also written: the share of the time spent waiting for data, and the peak of memory so far in GB.
        """
        now = time.perf_counter()
        elapsed = max(now - self._last_time, 1e-9)
        speed = {key: (line[key] - self._last.get(key, 0)) / elapsed for key in ("samples", "tokens", "images")}
        self.lines.append({**line, **{f"{key}_per_second": round(value, 2) for key, value in speed.items()},
                           "data_wait": round(self._waited / elapsed, 4), "peak_memory_gb": round(peak_memory(self.device) / 1e9, 3),
                           "seconds": round(now - self._start, 3)})
        self._last, self._last_time, self._waited = line, now, 0.0
        with self.path.open("a") as file:
            file.write(json.dumps(self.lines[-1]) + "\n")
        if now - self._drawn > DRAW_EVERY:
            self.draw()
        return speed

    def draw(self) -> None:
        """Loss with validation loss, learning rates, and gradient norm, against the step."""
        self._drawn = time.perf_counter()
        figure, (loss, rate, norm) = plt.subplots(1, 3, figsize=(13, 3.6), constrained_layout=True)
        loss.plot(*_series(self.lines, "loss"), label="training")
        loss.plot(*_series(self.lines, "val_loss"), "o-", label="validation")
        for name in sorted({key for line in self.lines for key in line if key.startswith("lr_")}):
            rate.plot(*_series(self.lines, name), label=name.removeprefix("lr_"))
        norm.plot(*_series(self.lines, "grad_norm"))
        for axes, title in ((loss, "loss per labelled token"), (rate, "learning rate"), (norm, "gradient norm before clipping")):
            axes.set(title=title, xlabel="optimizer step")
            axes.grid(alpha=0.3)
            if axes is not norm and axes.lines:
                axes.legend()
        with atomic_path(self.run / "curves.png") as temporary:
            figure.savefig(temporary, format="png", dpi=110)
        plt.close(figure)


def draw_answers(path: Path, rows: list[dict[str, Any]]) -> None:
    """One picture of questions and answers. Each row has `picture` (a PIL image), `prompt`, `answer`, `reference`.

    Where the system has no font with Chinese characters, a row that needs one points to its line in samples.jsonl.
    """
    chinese = _chinese_fonts()
    columns, height = 2, -(-len(rows) // 2)
    with plt.rc_context({"font.family": [*chinese, "DejaVu Sans"]}):
        figure, axes = plt.subplots(height, 2 * columns, figsize=(14, 2.3 * height), width_ratios=[1, 2.2] * columns,
                                    constrained_layout=True, squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for number, (row, picture, text) in enumerate(zip(rows, axes.flat[::2], axes.flat[1::2]), start=1):
            picture.imshow(np.asarray(row["picture"]))
            lines = [_wrap(f"{mark} {row[key]}") for mark, key in (("Q:", "prompt"), ("A:", "answer"), ("=", "reference"))]
            if not chinese and any(ord(character) > WIDE for line in lines for character in line):
                lines = [f"samples.jsonl, line {number}", "(this system has no Chinese font to draw it with)"]
            text.text(0, 0.5, "\n".join(lines), va="center", fontsize=9, transform=text.transAxes)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110)
        plt.close(figure)


def _series(lines: list[dict[str, Any]], key: str) -> tuple[list, list]:
    lines = [line for line in lines if key in line]
    return [line["step"] for line in lines], [line[key] for line in lines]


def _wrap(text: str, width: int = 58) -> str:
    """Break after `width` columns, a Chinese character taking two."""
    lines, columns = [""], 0
    for character in text.replace("\n", " "):
        size = 2 if ord(character) > WIDE else 1
        if columns + size > width:
            lines.append("    ")
            columns = 4
        lines[-1] += character
        columns += size
    return "\n".join(lines)


def _chinese_fonts() -> list[str]:
    """The name of one font of the system that has Chinese characters, looked up afresh: matplotlib's own list of fonts is
    from when it first ran."""
    known = ("pingfang", "hiragino sans gb", "msyh", "simhei", "notosanscjk", "notosanssc", "sourcehansans", "wqy",
             "droidsansfallback", "arial unicode")
    for path in sorted(font_manager.findSystemFonts()):
        if Path(path).name.lower().startswith(known):
            font_manager.fontManager.addfont(path)
            return [font_manager.FontProperties(fname=path).get_name()]
    return []
