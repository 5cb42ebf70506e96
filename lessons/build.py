"""Execute lesson sources and write their notebooks in both languages.

    python lessons/build.py        # all lessons
    python lessons/build.py 01 07  # some

A source is executed once, and both notebooks get its outputs.
"""

import argparse
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lessons.notebooks import (
    FOLDER,
    LANGUAGES,
    execute,
    in_language,
    lesson_names,
    pictures,
    read_source,
    write,
)


def build(name: str) -> str:
    """Execute one lesson and write its notebooks. Returns a line on what came out."""
    started = time.perf_counter()
    source = read_source(name)
    executed = execute(source)
    sizes = []
    for language in LANGUAGES:
        path = FOLDER / language / f"{name}.ipynb"
        write(in_language(source, executed, language), path)
        sizes.append(f"{language} {path.stat().st_size / 1e3:.0f} KB")
    seconds, count = time.perf_counter() - started, len(pictures(executed))
    return f"{name}: {seconds:.1f} s, {count} pictures, {', '.join(sizes)}"


def main() -> None:
    """Build the lessons whose numbers are given, or all."""
    parser = argparse.ArgumentParser(description="Execute lessons and write their notebooks.")
    parser.add_argument("numbers", nargs="*", metavar="NN", help="lessons to build (all)")
    numbers = parser.parse_args().numbers
    names = [name for name in lesson_names() if not numbers or name[:2] in numbers]
    unknown = set(numbers) - {name[:2] for name in names}
    if unknown:
        parser.error(f"no lesson {', '.join(sorted(unknown))} in {FOLDER / 'source'}")
    for name in names:
        print(build(name), flush=True)


if __name__ == "__main__":
    main()
