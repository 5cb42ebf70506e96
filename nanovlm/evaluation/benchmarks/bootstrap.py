"""How far a score could be off with other questions of the same kind: the bootstrap (Efron 1979).

The questions are drawn again, with replacement and as many as there are, and the score is computed
anew; the middle 95 % of many such scores is the interval. Questions that share an image, or are
rotations of one question, are drawn together. All columns are drawn alike (in pairs), so that the
interval of a difference leaves out what is hard for all of them.

Lesson: lessons/source/17_measuring.py.
"""

from collections.abc import Callable, Sequence

import numpy as np

TIMES = 2000  # draws
AT_ONCE = 100  # draws that are held in memory
SEED = 0
MIDDLE = (0.025, 0.975)

# From sums of counts, (…, K), to the scores, (…, S).
Statistic = Callable[[np.ndarray], np.ndarray]


def resample(counts: np.ndarray, clusters: Sequence[str], statistic: Statistic) -> np.ndarray:
    """The scores of TIMES draws, (TIMES, C, S).

    counts: (C, N, K), of C columns, N questions and K things that are counted, such as right
        answers. clusters: of each question, the name of what is drawn together.
    """
    numbers: dict[str, int] = {}
    cluster = [numbers.setdefault(name, len(numbers)) for name in clusters]
    columns, _, kinds = counts.shape
    totals = np.zeros((len(numbers), columns, kinds))
    np.add.at(totals, cluster, counts.transpose(1, 0, 2))
    generator = np.random.default_rng(SEED)
    equal = np.full(len(numbers), 1 / len(numbers))
    scores = []
    for _ in range(TIMES // AT_ONCE):
        drawn = generator.multinomial(len(numbers), equal, size=AT_ONCE)  # how often each
        scores.append(statistic(np.tensordot(drawn, totals, axes=1)))
    return np.concatenate(scores)


def interval(draws: np.ndarray) -> np.ndarray:
    """The middle 95 % of draws, (TIMES, …) → (2, …)."""
    return np.quantile(draws, MIDDLE, axis=0)
