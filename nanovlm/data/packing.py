"""Several samples in one row, and rows dealt out so that batches are filled evenly and little of them is padding.

A line is a list of `TokenSequence`s that will be one row of a batch; without packing it is a list of one.
"""

from collections.abc import Sequence

from nanovlm.data.sequences import TokenSequence
from nanovlm.model.attention import SEGMENT

PackedSequence = list[TokenSequence]


def first_fit_decreasing(rows: Sequence[TokenSequence], length: int) -> list[PackedSequence]:
    """Lines of at most `length` tokens with all `rows` in them: the longest first, each into the first line with room.

    Takes at most 11/9 of the fewest lines possible, and two thirds of one more (Johnson 1973; Dósa 2007). Every row
    has to fit into `length` by itself.
    """
    lines: list[PackedSequence] = []
    room: list[int] = []
    for row in sorted(rows, key=len, reverse=True):
        place = next((place for place, left in enumerate(room) if len(row) <= left), len(lines))
        if place == len(lines):
            lines.append([])
            room.append(length)
        lines[place].append(row)
        room[place] -= len(row)
    return lines


def join(line: Sequence[TokenSequence]) -> TokenSequence:
    """A line as one row whose tokens see those of their own sample only (`causal_mask`)."""
    if len(line) == 1:
        return line[0]
    return TokenSequence(
        [token for row in line for token in row.input_ids],
        [label for row in line for label in row.labels],
        [
            segment * SEGMENT + number
            for segment, row in enumerate(line)
            for number in row.attention_mask
        ],
        tuple(image for row in line for image in row.images),
        tuple(record for row in line for record in row.records),
    )


def cut_by_length(lines: Sequence[PackedSequence], count: int) -> list[list[PackedSequence]]:
    """Sorted by length and cut into `count` batches of alike numbers of records, so that a batch needs little padding.

    None is empty while there are lines enough.
    """
    lines = sorted(lines, key=_tokens)
    records = [sum(len(row.records) for row in line) for line in lines]
    batches, start = [], 0
    for left in range(count, 0, -1):
        share, end, taken = sum(records[start:]) / left, start, 0
        while end < len(lines) and (
            end == start or end + left <= len(lines) and taken + records[end] / 2 < share
        ):
            taken += records[end]
            end += 1
        batches.append(lines[start:end])
        start = end
    return batches


def deal(lines: Sequence[PackedSequence], count: int) -> list[list[PackedSequence]]:
    """Dealt into `count` hands of alike numbers of tokens: the longest first, each to the hand that has the fewest.

    Where there are fewer lines than hands, lines of several rows are halved, so that no hand stays empty while another
    has something to give.
    """
    while 0 < len(lines) < count and len(fullest := max(lines, key=len)) > 1:
        lines = [line for line in lines if line is not fullest] + [fullest[::2], fullest[1::2]]
    hands: list[list[PackedSequence]] = [[] for _ in range(count)]
    tokens = [0] * count
    for line in sorted(lines, key=_tokens, reverse=True):
        least = tokens.index(min(tokens))
        hands[least].append(line)
        tokens[least] += _tokens(line)
    return hands


def _tokens(line: PackedSequence) -> int:
    return sum(map(len, line))
