"""Reading what a run left, for the tests that compare runs."""

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
    """The lines of metrics.jsonl without what the clock and the machine say."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]
