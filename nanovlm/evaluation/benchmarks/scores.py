"""From the answers of a benchmark to its scores: with the image, blind and shuffled, each with the
interval that 95 % of the bootstrap's draws lie in."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from nanovlm.evaluation.benchmarks.bootstrap import interval, resample
from nanovlm.evaluation.benchmarks.questions import Question

COLUMNS = {"image": "none", "blind": "blind", "shuffled": "shuffled"}  # and their controls
DIFFERENCES = ("blind", "shuffled")  # what is taken off the score with the image


def score_benchmark(
    benchmark: ModuleType, questions: Sequence[Question], chosen: Mapping[str, Sequence[int | None]]
) -> dict[str, Any]:
    """The scores of all questions and of each part: {"n": …, "image": {…}, …, "parts": {…}}.

    chosen: for each of COLUMNS the place of the choice that each question is answered with, or None
    where the answer chooses none, which is wrong. `n` counts what is scored as one: questions, each
    with its rotations.
    """
    units: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        units.setdefault(question.unit, []).append(number)
    counts = np.array(
        [
            [
                benchmark.count([questions[n] for n in unit], [chosen[column][n] for n in unit])
                for unit in units.values()
            ]
            for column in COLUMNS
        ],
        dtype=float,
    )  # (C, N, K)
    firsts = [questions[unit[0]] for unit in units.values()]

    def scores_of(members: Sequence[int]) -> dict[str, Any]:
        clusters = [firsts[n].cluster for n in members]
        return _scores(counts[:, members], clusters, benchmark.statistic, benchmark.METRICS)

    parts: dict[str, dict[str, list[int]]] = {}
    for number, question in enumerate(firsts):
        for kind, value in question.parts.items():
            parts.setdefault(kind, {}).setdefault(value, []).append(number)
    chances = [math.prod(1 / len(questions[n].choices) for n in unit) for unit in units.values()]
    return {
        "n": len(units),
        "chance": round(sum(chances) / len(chances), 6),
        **scores_of(range(len(units))),
        "parts": {
            kind: {
                value: {"n": len(members), **scores_of(members)}
                for value, members in sorted(of_kind.items())
            }
            for kind, of_kind in parts.items()
        },
    }


def _scores(
    counts: np.ndarray,
    clusters: Sequence[str],
    statistic: Callable[[np.ndarray], np.ndarray],
    metrics: Sequence[str],
) -> dict[str, Any]:
    """The metrics of each column, and of the column with the image less each control.

    counts: (C, N, K), as `resample` takes them.
    """
    values, draws = statistic(counts.sum(axis=1)), resample(counts, clusters, statistic)
    names = list(COLUMNS)
    result = {name: _named(values[i], draws[:, i], metrics) for i, name in enumerate(names)}
    for control in DIFFERENCES:
        i = names.index(control)
        difference = values[0] - values[i], draws[:, 0] - draws[:, i]
        result[f"image_minus_{control}"] = _named(*difference, metrics)
    return result


def _named(values: np.ndarray, draws: np.ndarray, metrics: Sequence[str]) -> dict[str, Any]:
    """{"accuracy": …, …, "interval": {"accuracy": [low, high], …}}."""
    low, high = interval(draws)
    ends = zip(low.tolist(), high.tolist())
    return {
        **{name: round(value, 6) for name, value in zip(metrics, values.tolist())},
        "interval": {name: [round(end, 6) for end in both] for name, both in zip(metrics, ends)},
    }


def table(scores: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    """The scores as lines of a small table, in per cent: the whole, then each part."""
    headings = ["", "n", f"{metrics[0]} (95 %)", *metrics[1:], "blind", "shuffled"]
    lines = [headings, _row("all", scores, metrics)]
    for of_kind in scores["parts"].values():
        lines += [_row(name, part, metrics) for name, part in of_kind.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths))
        )
        for line in lines
    ]


def _row(name: str, part: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    image, first = part["image"], metrics[0]
    low, high = image["interval"][first]
    return [
        name,
        f"{part['n']:,}",
        f"{100 * image[first]:.1f} ({100 * low:.1f}–{100 * high:.1f})",
        *(f"{100 * image[metric]:.1f}" for metric in metrics[1:]),
        *(f"{100 * part[control][first]:.1f}" for control in DIFFERENCES),
    ]
