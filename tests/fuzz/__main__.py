"""Fuzz the readers: python -m tests.fuzz [--kind NAME] [--seed N] [--count N]."""

import argparse
import sys
import time

import torch

from tests.fuzz.kinds import KINDS
from tests.fuzz.run import fuzz, table


def main() -> int:
    """Read the flags, judge the inputs, print the failures and a table; 1 if any failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="default: all kinds")
    parser.add_argument("--seed", type=int, help="of the first input (default: today's date)")
    parser.add_argument("--count", type=int, help="inputs of each kind (default: 10,000 in all)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seed = int(time.strftime("%Y%m%d")) if arguments.seed is None else arguments.seed
    all_counts = []
    for name in arguments.kind or KINDS:
        kind = KINDS[name]
        counts = fuzz(kind, seed, arguments.count or kind.long)
        all_counts.append(counts)
        if counts.failures:
            print(counts.report(), end="\n\n", flush=True)
        print(f"{table([counts])}\n", file=sys.stderr)
    print(f"seed {seed}\n{table(all_counts)}")
    return int(any(counts.failures for counts in all_counts))


if __name__ == "__main__":
    sys.exit(main())
