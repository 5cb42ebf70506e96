"""Run what takes a lesson more than a minute, once, and keep the results with the lesson.

    python lessons/record.py 18

`recordings/NN.py` has a function `record()` that returns the results as JSON can hold them. They
are written to `recorded/NN.json` with the command, the machine and the time it took.
"""

import argparse
import importlib
import json
import os
import platform
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from lessons.notebooks import FOLDER


def main() -> None:
    """Record the lessons whose numbers are given."""
    parser = argparse.ArgumentParser(description="Run a lesson's long experiments and keep them.")
    known = sorted(path.stem for path in (FOLDER / "recordings").glob("[0-9][0-9].py"))
    parser.add_argument("numbers", nargs="+", metavar="NN", choices=known, help="lessons to record")
    for number in parser.parse_args().numbers:
        started = time.perf_counter()
        results = importlib.import_module(f"lessons.recordings.{number}").record()
        made = {
            "command": f"python lessons/record.py {number}",
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
            "minutes": round((time.perf_counter() - started) / 60, 1),
            "results": results,
        }
        path = FOLDER / "recorded" / f"{number}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{path}: {made['minutes']} minutes")


if __name__ == "__main__":
    main()
