"""Several token sequences in one row, and rows divided among batches and processes.

Each of them is to get about the same amount of work, with little padding in it.

Lesson: lessons/source/16_batches.py.
"""

from collections.abc import Sequence

from nanovlm.data.sequences import TokenSequence
from nanovlm.model.attention import SEGMENT

PackedSequence = list[TokenSequence]  # that will be one row of a batch; of one, without packing


def first_fit_decreasing(sequences: Sequence[TokenSequence], length: int) -> list[PackedSequence]:
    """Pack all `sequences` into rows of at most `length` tokens; none may be longer than that.

    The longest comes first, and each goes into the first row with room for it. Takes at most 11/9
    of the fewest rows possible, and two thirds of one more (Johnson 1973; Dósa 2007).
    """
    rows: list[PackedSequence] = []
    room: list[int] = []
    for sequence in sorted(sequences, key=len, reverse=True):
        index = next((i for i, left in enumerate(room) if len(sequence) <= left), len(rows))
        if index == len(rows):
            rows.append([])
            room.append(length)
        rows[index].append(sequence)
        room[index] -= len(sequence)
    return rows


def join(packed: PackedSequence) -> TokenSequence:
    """A packed sequence as one, in which tokens attend to their own part only (`causal_mask`)."""
    if len(packed) == 1:
        return packed[0]
    return TokenSequence(
        [token for sequence in packed for token in sequence.input_ids],
        [label for sequence in packed for label in sequence.labels],
        [
            segment * SEGMENT + number
            for segment, sequence in enumerate(packed)
            for number in sequence.attention_mask
        ],
        tuple(image for sequence in packed for image in sequence.images),
        tuple(record for sequence in packed for record in sequence.records),
    )


def cut_by_length(rows: Sequence[PackedSequence], count: int) -> list[list[PackedSequence]]:
    """Sort `rows` by length and cut them into `count` batches of about equally many records.

    So each batch needs little padding. No batch is empty if there are rows enough.
    """
    rows = sorted(rows, key=_tokens)
    records = [sum(len(sequence.records) for sequence in row) for row in rows]
    batches, start = [], 0
    for left in range(count, 0, -1):
        share, end, taken = sum(records[start:]) / left, start, 0
        while end < len(rows):
            leaves_enough = end + left <= len(rows) and taken + records[end] / 2 < share
            if end > start and not leaves_enough:
                break
            taken += records[end]
            end += 1
        batches.append(rows[start:end])
        start = end
    return batches


def deal(rows: Sequence[PackedSequence], count: int) -> list[list[PackedSequence]]:
    """Divide `rows` into `count` parts of about equally many tokens.

    The longest row comes first, and each goes to the part that has the fewest tokens so far. If
    there are fewer rows than parts, rows of several sequences are halved, so that a part stays
    empty only when there is nothing left to divide.
    """
    rows = list(rows)
    while 0 < len(rows) < count and len(fullest := max(rows, key=len)) > 1:
        rows = [row for row in rows if row is not fullest] + [fullest[::2], fullest[1::2]]
    parts: list[list[PackedSequence]] = [[] for _ in range(count)]
    tokens = [0] * count
    for row in sorted(rows, key=_tokens, reverse=True):
        least = tokens.index(min(tokens))
        parts[least].append(row)
        tokens[least] += _tokens(row)
    return parts


def _tokens(row: PackedSequence) -> int:
    return sum(map(len, row))
