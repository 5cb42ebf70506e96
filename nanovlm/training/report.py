"""What a run writes down as it goes: metrics.jsonl, and curves.png drawn from it."""

import json
import time
from pathlib import Path
from typing import Any

from nanovlm.files import write_atomically
from nanovlm.training.figures import plt, save_figure

DRAW_EVERY = 30.0  # seconds between redrawings of the curves


class RunLog:
    """Appends to `metrics.jsonl` and redraws `curves.png`. A resumed run drops the lines after its checkpoint, which
    it is going to write again."""

    def __init__(self, run: Path, start_step: int) -> None:
        self.run, self.path = run, run / "metrics.jsonl"
        self.lines = keep_lines(self.path, start_step)
        self._start = time.perf_counter() - max((line["seconds"] for line in self.lines), default=0.0)
        self._last = self.lines[-1] if self.lines else {}
        self._last_time, self._drawn = time.perf_counter(), time.perf_counter()

    def write(self, line: dict[str, Any]) -> dict[str, float]:
        """Append one line and return the speed since the one before: samples and tokens a second."""
        now = time.perf_counter()
        speed = {key: (line[key] - self._last.get(key, 0)) / max(now - self._last_time, 1e-9) for key in ("samples", "tokens")}
        self._last, self._last_time = line, now
        self.lines.append({**line, "samples_per_second": round(speed["samples"], 2),
                           "tokens_per_second": round(speed["tokens"], 1), "seconds": round(now - self._start, 3)})
        with self.path.open("a") as file:
            file.write(json.dumps(self.lines[-1]) + "\n")
        if now - self._drawn > DRAW_EVERY:
            self.draw()
        return speed

    def draw(self) -> None:
        """Loss with validation loss, learning rates, gradient norm and speed, against the step."""
        self._drawn = time.perf_counter()
        figure, ((loss, rate), (norm, speed)) = plt.subplots(2, 2, figsize=(11, 6.6), constrained_layout=True)
        loss.plot(*series(self.lines, "loss"), label="training")
        loss.plot(*series(self.lines, "val_loss"), "o-", label="validation")
        for name in sorted({key for line in self.lines for key in line if key.startswith("lr_")}):
            rate.plot(*series(self.lines, name), label=name.removeprefix("lr_"))
        norm.plot(*series(self.lines, "grad_norm"))
        speed.plot(*series(self.lines, "tokens_per_second"))
        speed.set_ylim(bottom=0)
        for axes, title in ((loss, "loss per labelled token"), (rate, "learning rate"),
                            (norm, "gradient norm before clipping"), (speed, "tokens per second")):
            axes.set(title=title, xlabel="optimizer step")
            axes.grid(alpha=0.3)
        loss.legend()
        if rate.lines:
            rate.legend()
        save_figure(figure, self.run / "curves.png")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a .jsonl file that a run appends to; none where there is no file yet."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]] if path.exists() else []


def keep_lines(path: Path, start_step: int) -> list[dict[str, Any]]:
    """The lines up to `start_step`, cutting the later ones off the file: a resumed run is going to write them again."""
    lines = [line for line in read_lines(path) if line["step"] <= start_step]
    if path.exists():
        write_atomically(path, to_jsonl(lines))
    return lines


def to_jsonl(lines: list[dict[str, Any]]) -> str:
    """One JSON object a line, Chinese as it is read."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def series(lines: list[dict[str, Any]], key: str) -> tuple[list, list]:
    """The steps at which `key` was logged, and its values."""
    lines = [line for line in lines if key in line]
    return [line["step"] for line in lines], [line[key] for line in lines]
