"""Samples → token sequences. Samples with a common prefix, image included, can share it.

Lesson: lessons/source/16_batches.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from pathlib import Path

from nanovlm.inputs.chat import IGNORED, Sample


@dataclass
class TokenSequence:
    """What one row of a batch holds, with the images in order and the names of the records.

    Token ids, labels and the attention mask's numbers (`causal_mask`) have one length.
    """

    input_ids: list[int]
    labels: list[int]
    attention_mask: list[int]
    images: tuple[Path, ...]
    records: tuple[str, ...] = ()

    @classmethod
    def of(cls, sample: Sample, images: tuple[Path, ...] = (), record: str = "") -> "TokenSequence":
        """One sample by itself."""
        return cls(sample.input_ids, sample.labels, [1] * len(sample.input_ids), images, (record,))

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def has_branches(self) -> bool:
        """Whether it is more than one sample by itself."""
        return max(self.attention_mask) > 1


def chunks(items: list, size: int) -> list[list]:
    """`items` in order, `size` at a time."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def share_prefix(sequences: Sequence[TokenSequence], image_token_id: int) -> list[TokenSequence]:
    """Join samples of the same images: their common prefix once, then one branch for each.

    Tokens of a branch attend to the prefix and to their own branch, so every logit is what it is in
    a sequence of one sample, for a fraction of the work. The sequences are returned as they are
    where not all images lie in the prefix, where one has branches already, and where one has no
    labels, such as those of words.
    """
    if len(sequences) == 1 or any(
        sequence.has_branches or set(sequence.labels) == {IGNORED} for sequence in sequences
    ):
        return list(sequences)
    # A branch starts before its first label, because the token that predicts a label has to stand
    # right before it.
    first_label = min(
        next(i for i, label in enumerate(sequence.labels) if label != IGNORED)
        for sequence in sequences
    )
    ids = zip(*(sequence.input_ids for sequence in sequences))
    alike = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, ids))
    shared = min(alike, first_label - 1)
    if any(image_token_id in sequence.input_ids[shared:] for sequence in sequences):
        return list(sequences)
    joined = TokenSequence(
        sequences[0].input_ids[:shared],
        [IGNORED] * shared,
        [1] * shared,
        sequences[0].images,
        tuple(record for sequence in sequences for record in sequence.records),
    )
    for branch, sequence in enumerate(sequences, start=2):
        joined.input_ids += sequence.input_ids[shared:]
        joined.labels += sequence.labels[shared:]
        joined.attention_mask += [branch] * (len(sequence) - shared)
    return [joined]


def share_prefixes(
    sequences: Sequence[TokenSequence], image_token_id: int, at_most: int, longest: int = 0
) -> list[TokenSequence]:
    """`share_prefix` for neighbours with the same images, up to `at_most` at a time.

    Fewer at a time where the result would have more than `longest` tokens (0: any length). The
    order stays.
    """
    shared = []
    for _, group in groupby(sequences, key=lambda sequence: sequence.images):
        for chunk in chunks(list(group), at_most):
            joined = share_prefix(chunk, image_token_id)
            if longest and any(len(sequence) > longest for sequence in joined):
                joined = share_prefixes(chunk, image_token_id, len(chunk) // 2, longest)
            shared += joined
    return shared
