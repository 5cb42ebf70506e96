"""Many inputs of one kind: how many are read, refused and failed, and the smallest that fail."""

import time
from dataclasses import dataclass, field
from random import Random

from tests.fuzz.inputs import Input, Kind
from tests.fuzz.judge import Verdict, judge
from tests.fuzz.smallest import smallest

SHOWN = 500  # characters of a file's content


@dataclass
class Failure:
    """The first input that failed for one reason, made smaller, and how many others did."""

    seed: int
    verdict: Verdict
    input: Input
    others: int = 0

    def report(self, kind: Kind) -> str:
        """What failed, how to repeat it, and the input."""
        more = f" (and {self.others} more inputs)" if self.others else ""
        return "\n".join(
            [
                f"{kind.name}: {self.verdict.reason}{more}",
                f"  again:  python -m tests.fuzz --kind {kind.name} --seed {self.seed} --count 1",
                "  the smallest input found that fails in the same way:",
                *(f"    argument {argument!r:.{SHOWN}}" for argument in self.input.arguments),
                *(
                    f"    {name}: {content!r:.{SHOWN}}"
                    for name, content in self.input.files.items()
                ),
                *(f"    | {line}" for line in _details(self.verdict)),
            ]
        )


@dataclass
class Counts:
    """What became of the inputs of one kind."""

    kind: Kind
    outcomes: dict[str, int] = field(default_factory=lambda: {"read": 0, "refused": 0, "failed": 0})
    seconds: float = 0.0
    failures: dict[str, Failure] = field(default_factory=dict)  # by their reasons

    def report(self) -> str:
        """Every failure."""
        return "\n".join(failure.report(self.kind) for failure in self.failures.values())


def fuzz(kind: Kind, seed: int, count: int) -> Counts:
    """Judge `count` inputs, made from `seed`, `seed` + 1, and so on."""
    counts, start = Counts(kind), time.perf_counter()
    for number in range(seed, seed + count):
        input = kind.make(Random(f"{kind.name}/{number}"))
        verdict = judge(kind, input)
        counts.outcomes[verdict.outcome] += 1
        if verdict.outcome != "failed":
            continue
        if known := counts.failures.get(verdict.reason):
            known.others += 1
        else:
            counts.failures[verdict.reason] = _minimised(kind, number, input, verdict)
    counts.seconds = time.perf_counter() - start
    return counts


def _details(verdict: Verdict) -> list[str]:
    """The last lines of a traceback, without those that underline, or of what was printed."""
    return [line for line in verdict.details.splitlines() if line.strip("^~ ")][-12:]


def _minimised(kind: Kind, seed: int, input: Input, verdict: Verdict) -> Failure:
    if not verdict.reason.startswith("HangError"):  # each try of those takes too long
        input = smallest(input, lambda smaller: judge(kind, smaller).reason == verdict.reason)
    return Failure(seed, verdict, input)


def table(all_counts: list[Counts]) -> str:
    """One line a kind: its inputs, and what became of them."""
    lines = [f"{'kind':<12} {'inputs':>7} {'read':>7} {'refused':>7} {'failed':>7} {'seconds':>8}"]
    for counts in all_counts:
        numbers = " ".join(f"{number:>7}" for number in counts.outcomes.values())
        total = sum(counts.outcomes.values())
        lines.append(f"{counts.kind.name:<12} {total:>7} {numbers} {counts.seconds:>8.1f}")
    return "\n".join(lines)
