"""Encoded samples → one batch. Samples that begin alike, image included, can share a row and read the image once."""

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path

import torch

from nanovlm.inputs.batch import Batch
from nanovlm.inputs.chat import IGNORED, Encoded


@dataclass(frozen=True)
class Sample:
    """A tokenized record and the images it shows, in order. `record` names it in messages."""

    encoded: Encoded
    images: tuple[Path, ...]
    record: str = ""


@dataclass
class TokenSequence:
    """One line of a batch: token ids, labels and the attention mask's numbers (`causal_mask`), all of one length, and
    the names of the records in it."""

    input_ids: list[int]
    labels: list[int]
    attention_mask: list[int]
    images: tuple[Path, ...]
    records: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, encoded: Encoded, images: tuple[Path, ...] = (), record: str = ""
    ) -> "TokenSequence":
        """A sample in a row of its own."""
        return cls(
            encoded.input_ids, encoded.labels, [1] * len(encoded.input_ids), images, (record,)
        )

    def __len__(self) -> int:
        return len(self.input_ids)


def chunks(items: list, size: int) -> list[list]:
    """`items` in order, `size` at a time."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def share_prefix(samples: Sequence[Sample], image_token_id: int) -> list[TokenSequence]:
    """Lay out samples of the same images as one row: what they have in common once, then each one's own branch.

    The branches see the common beginning and not each other, so every logit is what it would be in a row of its
    own, at a fraction of the work. Where they do not have all images in common, each sample gets its own row.
    """
    sequences = [sample.encoded.input_ids for sample in samples]
    # A branch starts before its first label, since the token that predicts a label has to stand right before it.
    first_labels = [
        next(i for i, label in enumerate(sample.encoded.labels) if label != IGNORED)
        for sample in samples
    ]
    shared = min(len(commonprefix(sequences)), min(first_labels) - 1)
    if len(samples) == 1 or any(image_token_id in sequence[shared:] for sequence in sequences):
        return [
            TokenSequence.of(sample.encoded, sample.images, sample.record) for sample in samples
        ]
    row = TokenSequence(
        sequences[0][:shared],
        [IGNORED] * shared,
        [1] * shared,
        samples[0].images,
        tuple(sample.record for sample in samples),
    )
    for branch, sample in enumerate(samples, start=2):
        row.input_ids += sample.encoded.input_ids[shared:]
        row.labels += sample.encoded.labels[shared:]
        row.attention_mask += [branch] * (len(sample.encoded.input_ids) - shared)
    return [row]


def collate(rows: Sequence[TokenSequence], image_token_id: int, pad_left: bool = False) -> Batch:
    """Pad rows to one length, and find where images go and what is to be predicted. Pixels are added by the caller.

    `pad_left` is for generation, where it makes all rows end together.
    """
    length = max(map(len, rows))

    def stack(name: str, padding: int) -> torch.Tensor:
        padded = torch.full((len(rows), length), padding)
        for line, row in zip(padded, rows):
            values = torch.tensor(getattr(row, name))
            line[-len(values) :] = values if pad_left else line[-len(values) :]
            line[: len(values)] = line[: len(values)] if pad_left else values
        return padded

    input_ids, labels, attention_mask = (
        stack("input_ids", 0),
        stack("labels", IGNORED),
        stack("attention_mask", 0),
    )
    targets = labels.flatten()
    target_index = (targets != IGNORED).nonzero()[:, 0]
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        image_positions=((input_ids == image_token_id) & (attention_mask > 0))
        .flatten()
        .nonzero()[:, 0],
        target_positions=target_index - 1,
        targets=targets[target_index],
    )
