"""The log of a run, for tests that compare runs."""

import json
from pathlib import Path

CLOCK = (
    "seconds",
    "samples_per_second",
    "tokens_per_second",
    "images_per_second",
    "data_wait",
    "peak_memory_gb",
    "mfu",
)


def metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl without the columns that depend on the clock or the machine."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]
