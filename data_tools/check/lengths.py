"""Records in tokens: what `--max-length` cuts, and what `--pack` saves."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch.utils.data import Dataset

from nanovlm.data.batches import BatchOptions, RecordEncoder
from nanovlm.data.packing import cut_by_length, first_fit_decreasing
from nanovlm.data.records import Record
from nanovlm.data.sequences import TokenSequence, chunks
from nanovlm.data.workers import Loading, prepare_ahead
from nanovlm.errors import NanoVLMError
from nanovlm.hub.chat_configs import read_chat_config
from nanovlm.hub.models import load_model
from nanovlm.inputs.chat import IGNORED, Chat
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.tokenizer import load_tokenizer

AT_ONCE = 32  # records that a worker hands over together
UNLIMITED = 2**31 - 1
# What packing and sorting are computed for; see `--batch-size` and `--bucket`.
BATCH, BUCKET = 32, 32


class Length(NamedTuple):
    """The tokens of a record, and what a limit leaves of it."""

    tokens: int = 0
    answer: int = 0  # labelled tokens
    kept_answer: int = 0  # of them within the limit
    skipped: str = ""  # why training would skip it at this limit

    @property
    def is_cut(self) -> bool:
        """Whether the limit cuts it."""
        return not self.skipped and self.kept_answer < self.answer


def encoder_of(model: Path | None, tokenizer: Path | None, image_tokens: int) -> RecordEncoder:
    """The encoder of a model, or of a tokenizer with so many visual tokens an image."""
    if model is not None:
        return RecordEncoder.of(load_model(model))
    assert tokenizer is not None
    words = load_tokenizer(tokenizer)
    config = read_chat_config(tokenizer, words)
    words.add_special_token(config.image_token)
    return RecordEncoder(Chat(config, words), ImageConfig(), image_tokens)


def measure_lengths(
    records: Sequence[Record], encoder: RecordEncoder, limit: int, workers: int
) -> Iterator[Length]:
    """The length of each record, in order, whatever the number of `workers`."""
    groups = _Groups(chunks(list(records), AT_ONCE), encoder, limit)
    for lengths in prepare_ahead(groups, 0, len(groups.groups), Loading(workers)):
        yield from lengths


class _Groups(Dataset):
    """Records a few at a time, which costs less to hand over."""

    def __init__(self, groups: list[list[Record]], encoder: RecordEncoder, limit: int) -> None:
        self.groups, self.encoder, self.limit = groups, encoder, limit

    def __getitem__(self, number: int) -> list[Length]:
        return [self._measure(record) for record in self.groups[number]]

    def _measure(self, record: Record) -> Length:
        try:
            whole, _ = self.encoder.encode(record, BatchOptions(1, UNLIMITED))
        except NanoVLMError as error:
            return Length(skipped=str(error))
        answer = kept = _labelled(whole.labels)
        skipped = ""
        if len(whole) > self.limit:
            kept = _labelled(whole.labels[: self.limit])
            try:  # training's own words, where nothing is left to learn or an image is cut
                self.encoder.encode(record, BatchOptions(1, self.limit))
            except NanoVLMError as error:
                skipped = str(error)
        return Length(len(whole), answer, kept, skipped)


def _labelled(labels: list[int]) -> int:
    return sum(label != IGNORED for label in labels)


@dataclass(frozen=True)
class _Row:
    """A sequence of which only the length is known."""

    tokens: int
    records: tuple[str, ...] = ("",)

    def __len__(self) -> int:
        return self.tokens


def summarise(lengths: Sequence[Length], limit: int) -> dict[str, Any]:
    """The numbers of the report; None of the lengths may be missing."""
    tokens = sorted(length.tokens for length in lengths if length.tokens)
    answers = sorted(length.answer for length in lengths if length.tokens)
    used = [min(length.tokens, limit) for length in lengths if not length.skipped]
    total = sum(answers)
    kept = sum(length.kept_answer for length in lengths if not length.skipped)
    return {
        "max_length": limit,
        "tokens": percentiles(tokens),
        "answer_tokens": percentiles(answers),
        "cut_records": sum(length.is_cut for length in lengths),
        "skipped_records": sum(bool(length.skipped) for length in lengths),
        "lost_answer_tokens": total - kept,
        "lost_answer_share": (total - kept) / max(total, 1),
        "padding": _padding(used, limit),
    }


def percentiles(values: Sequence[float], at: Sequence[int] = (0, 5, 50, 95, 99, 100)) -> dict:
    """Values at these percentiles of sorted `values` (nearest rank), with their mean and sum."""
    if not values:
        return {}
    last = len(values) - 1
    found = {f"p{share}": values[round(share / 100 * last)] for share in at}
    return {**found, "mean": sum(values) / len(values), "sum": sum(values)}


def _padding(tokens: Sequence[int], limit: int) -> dict[str, float]:
    """The share of padding in batches of 32 rows: in order, sorted by length, and packed.

    Records are shuffled, and taken 32 batches at a time, as `--bucket 32` does. Records of one
    image that share a prefix are not counted as such.
    """
    if not tokens:
        return {}
    shuffled = list(tokens)
    random.Random(0).shuffle(shuffled)
    slots = {"plain": 0, "bucket": 0, "pack": 0}
    for part in chunks(shuffled, BATCH * BUCKET):
        rows = cast(list[TokenSequence], [_Row(length) for length in part])
        sorted_ = cut_by_length([[row] for row in rows], -(-len(rows) // BATCH))
        slots["plain"] += sum(len(batch) * max(batch) for batch in chunks(part, BATCH))
        slots["bucket"] += sum(
            len(batch) * max(len(row[0]) for row in batch) for batch in sorted_ if batch
        )
        slots["pack"] += limit * len(first_fit_decreasing(rows, limit))
    return {name: 1 - sum(tokens) / count for name, count in slots.items()}
