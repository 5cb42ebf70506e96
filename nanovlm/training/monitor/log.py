"""The log of a run: metrics.jsonl, and curves.png drawn from it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nanovlm.utils.console import say
from nanovlm.utils.device import peak_memory, reserved_memory
from nanovlm.utils.figures import plt, save_figure
from nanovlm.utils.files import open_regular, parse_json, to_jsonl, write_atomically
from nanovlm.utils.processes import is_main

DRAW_EVERY = 30.0  # seconds between redrawings of the curves
MAX_LINE = 2**24  # bytes; no run writes a longer line
MAX_NAMED = 10  # damaged lines that are named
# Texts of each line, by the name of the file. All other values are numbers, but for `records`.
TEXTS = {
    "samples.jsonl": ("where", "prompt", "answer", "reference"),
    "bad_steps.jsonl": ("loss", "grad_norm"),
}


class RunLog:
    """Appends to `metrics.jsonl` and redraws `curves.png`.

    A resumed run drops the lines after its checkpoint, since it repeats those steps.
    """

    def __init__(self, run: Path, start_step: int, device: torch.device) -> None:
        self.run, self.path, self.device = run, run / "metrics.jsonl", device
        self.lines = keep_lines(self.path, start_step)
        before = max((line.get("seconds") or 0.0 for line in self.lines), default=0.0)
        self._start = time.perf_counter() - before
        self._last: dict[str, Any] = self.lines[-1] if self.lines else {}
        self._since = self._drawn = time.perf_counter()  # start of the interval that is measured
        self._stopped: float | None = None  # when the clock of training was stopped
        self._waited = 0.0  # seconds of the interval spent waiting for data

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time spent inside as `data_wait`."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Leave the time spent inside out of the speeds: validation and saving are not training."""
        self._stopped = time.perf_counter()
        yield
        self._since += time.perf_counter() - self._stopped
        self._stopped = None

    @property
    def trained_seconds(self) -> float:
        """Seconds of training since the last line."""
        return max((self._stopped or time.perf_counter()) - self._since, 1e-9)

    def write(self, line: dict[str, Any]) -> dict[str, float]:
        """Append one line; returns the samples, tokens and images per second since the last one.

        Also written: the share of the batches' positions that hold a token (`fill`), the share of
        the time spent waiting for data, and the peak of memory so far in GB, on CUDA also with the
        holes that its allocator holds.
        """
        now, elapsed = time.perf_counter(), self.trained_seconds
        keys = ("samples", "tokens", "images", "slots")
        gained = {key: line[key] - (self._last.get(key) or 0) for key in keys}
        reserved = {}
        if held := reserved_memory(self.device):
            reserved["reserved_memory_gb"] = round(held / 1e9, 3)
        speed = {key: gained[key] / elapsed for key in ("samples", "tokens", "images")}
        self.lines.append(
            {
                **line,
                **{f"{key}_per_second": round(value, 2) for key, value in speed.items()},
                "fill": round(gained["tokens"] / max(gained["slots"], 1), 4),
                "data_wait": round(self._waited / elapsed, 4),
                "peak_memory_gb": round(peak_memory(self.device) / 1e9, 3),
                **reserved,
                "seconds": round(now - self._start, 3),
            }
        )
        self._last, self._since, self._waited = line, self._stopped or now, 0.0
        append_lines(self.path, self.lines[-1:])
        if now - self._drawn > DRAW_EVERY:
            self.draw()
        return speed

    def draw(self) -> None:
        """Draw losses, learning rates, gradient norm and speed over the steps."""
        self._drawn = time.perf_counter()
        if not is_main():
            return
        figure, ((loss, rate), (norm, speed)) = plt.subplots(
            2, 2, figsize=(11, 6.6), constrained_layout=True
        )
        loss.plot(*series(self.lines, "loss"), label="training")
        loss.plot(*series(self.lines, "val_loss"), "o-", label="validation")
        for name in sorted({key for line in self.lines for key in line if key.startswith("lr_")}):
            rate.plot(*series(self.lines, name), label=name.removeprefix("lr_"))
        norm.plot(*series(self.lines, "grad_norm"))
        speed.plot(*series(self.lines, "tokens_per_second"))
        speed.set_ylim(bottom=0)
        target = "pair" if "margin" in self._last else "labelled token"
        for axes, title in (
            (loss, f"loss per {target}"),
            (rate, "learning rate"),
            (norm, "gradient norm before clipping"),
            (speed, "tokens per second"),
        ):
            axes.set(title=title, xlabel="optimizer step")
            axes.grid(alpha=0.3)
        loss.legend()
        if rate.lines:
            rate.legend()
        save_figure(figure, self.run / "curves.png")


def keep_lines(path: Path, start_step: int) -> list[dict[str, Any]]:
    """The lines up to `start_step`. Later ones are cut off the file: a resumed run repeats them."""
    lines = [line for line in read_log(path) if line["step"] <= start_step]
    if path.exists() and is_main():
        write_atomically(path, to_jsonl(lines))
    return lines


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, samples.jsonl or bad_steps.jsonl; none if there is no such file.

    A last line without an end is still being written, or was cut off. Other damaged lines are named
    on stderr and left out, and so are numbers of metrics that are not finite.
    """
    lines, damaged = [], []
    if not path.exists():
        return lines
    with open_regular(path) as file:
        pieces = iter(lambda: file.readline(MAX_LINE), b"")
        for number, piece in enumerate(pieces, start=1):
            line = _parse_line(piece, TEXTS.get(path.name, ()))
            if line is not None and piece.endswith(b"\n"):
                lines.append(line)
            elif piece.endswith(b"\n") or len(piece) == MAX_LINE:
                damaged.append(str(number))
    if damaged:
        named = ", ".join(damaged[:MAX_NAMED]) + (", …" if damaged[MAX_NAMED:] else "")
        say(f"{path}: not a line of {path.stem.replace('_', ' ')}, skipped: line {named}")
    return lines


def _parse_line(piece: bytes, texts: tuple[str, ...]) -> dict[str, Any] | None:
    """One line of a log, or None if it is damaged. Without `texts` it has numbers alone."""
    try:
        line = parse_json(piece.decode())
    except ValueError:
        return None
    step = line.get("step") if isinstance(line, dict) else None
    if type(step) is not int or not is_finite(step):
        return None
    if texts:
        return line if all(isinstance(line.get(key), str) for key in texts) else None
    return {key: value for key, value in line.items() if value is None or is_finite(value)}


def is_finite(value: Any) -> bool:
    """Whether a value is a number that floating point can hold."""
    return type(value) in (int, float) and -1e308 < value < 1e308


def append_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Add lines to a .jsonl file; of several processes, rank 0 writes."""
    if is_main():
        with path.open("a", encoding="utf-8") as file:
            file.write(to_jsonl(lines))


def series(lines: list[dict[str, Any]], key: str) -> tuple[list, list]:
    """The steps at which `key` was logged, and its values."""
    lines = [line for line in lines if key in line]
    return [line["step"] for line in lines], [line[key] for line in lines]
