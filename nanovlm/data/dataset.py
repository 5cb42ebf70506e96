"""The order in which a run sees its records, and the batch that each step takes.

Batch number i is a function of the records, the seed and i alone. So a run can stop anywhere and go on at the
next batch, and any number of worker processes prepare the same ones.
"""

import dataclasses
import random
import signal
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nanovlm.chat import IGNORED, Chat
from nanovlm.data.batches import Sample, chunks, collate, share_prefix
from nanovlm.data.records import Record
from nanovlm.errors import NanoVLMError
from nanovlm.image import ImageConfig, open_image, preprocess
from nanovlm.vlm import Batch


@dataclass
class Loaded:
    """A batch, how many records are in it, and why others are not."""

    batch: Batch | None  # None when every record of it had to be skipped
    samples: int
    tokens: int  # without padding
    skipped: list[str]
    cut: list[str]  # records whose text was cut at the end

    def pin_memory(self) -> "Loaded":
        """What the loader calls where batches go on to a GPU."""
        return self if self.batch is None else dataclasses.replace(self, batch=self.batch.pin_memory())


class Batches(Dataset):
    """The batches of a run, by number."""

    def __init__(self, records: Sequence[Record], chat: Chat, image: ImageConfig, image_length: int, *, batch_size: int,
                 share: int, max_length: int, seed: int, shuffle: bool = True,
                 features: "dict[Path, Tensor] | None" = None, rank: int = 0, world: int = 1) -> None:
        """`image_length` is the number of visual tokens an image takes. `share` is how many samples of one image may
        share a row. `features` are patch vectors to use in place of pixels. Of `world` processes that train together,
        each takes `batch_size` records a batch, this one the slice number `rank`."""
        self.records, self.chat, self.image, self.image_length = records, chat, image, image_length
        self.batch_size, self.share, self.max_length = batch_size, share, max_length
        self.seed, self.shuffle, self.features = seed, shuffle, features
        self.rank, self.world = rank, world
        self._orders: dict[int, list[int]] = {}  # by epoch

    def __getitem__(self, number: int) -> Loaded:
        first = (number * self.world + self.rank) * self.batch_size
        samples, skipped, cut = [], [], []
        pixels: dict[Path, Tensor] = {}
        # Unshuffled records are read once, for the validation loss; shuffled ones over and over.
        end = first + self.batch_size if self.shuffle else min(first + self.batch_size, len(self.records))
        for position in range(first, end):
            epoch, index = divmod(position, len(self.records))
            if epoch not in self._orders:
                self._orders = {epoch: self._order(epoch)}
            record = self.records[self._orders[epoch][index]]
            try:
                pixels |= {path: self._load(path) for path in record.images if path not in pixels}
                sample, is_cut = self._encode(record)
            except NanoVLMError as error:
                skipped.append(f"{record.where}: {error}")
                continue
            samples.append(sample)
            cut += [record.where] if is_cut else []
        if not samples:
            return Loaded(None, 0, 0, skipped, cut)
        rows = [row for _, group in groupby(samples, key=lambda sample: sample.images)
                for chunk in chunks(list(group), self.share)
                for row in share_prefix(chunk, self.chat.image_token_id)]
        batch = collate(rows, self.chat.image_token_id)
        if images := [pixels[path] for row in rows for path in row.images]:
            stacked = torch.stack(images)
            batch.patches, batch.pixels = (stacked, None) if self.features is not None else (None, stacked)
        return Loaded(batch, len(samples), int((batch.attention_mask > 0).sum()), skipped, cut)

    def loader(self, first: int, last: int, workers: int, pin_memory: bool = False) -> Iterator[Loaded]:
        """Batches `first` to `last` - 1 in order, prepared ahead by `workers` processes (0: in this one)."""
        # A generator of its own: a loader draws a number when it starts, and a resumed run starts one more loader.
        return iter(DataLoader(self, batch_size=None, sampler=range(first, last), num_workers=workers, pin_memory=pin_memory,
                               worker_init_fn=_leave_interrupts_to_the_parent, generator=torch.Generator()))

    def _load(self, path: Path) -> Tensor:
        if self.features is not None:
            if path not in self.features:
                raise NanoVLMError(f"image {path} could not be read")
            return self.features[path]
        return preprocess(open_image(path), self.image)

    def _encode(self, record: Record) -> tuple[Sample, bool]:
        encoded = self.chat.encode(record.messages, [self.image_length] * len(record.images))
        truncated = len(encoded.input_ids) > self.max_length
        if truncated:
            if self.chat.image_token_id in encoded.input_ids[self.max_length:]:
                raise NanoVLMError(f"an image lies beyond {self.max_length} tokens and an image is never cut; raise --max-length")
            del encoded.input_ids[self.max_length:], encoded.labels[self.max_length:]
        if all(label == IGNORED for label in encoded.labels):
            raise NanoVLMError(f"no word of an answer lies within {self.max_length} tokens; raise --max-length")
        return Sample(encoded, record.images), truncated

    def _order(self, epoch: int) -> list[int]:
        """Record numbers in the order of one epoch: shuffled, with samples of one image in groups of up to `share`."""
        if not self.shuffle:
            return list(range(len(self.records)))
        generator = random.Random(f"{self.seed}/{epoch}")
        by_image: dict[tuple[Path, ...] | int, list[int]] = defaultdict(list)
        for index, record in enumerate(self.records):
            by_image[record.images or index].append(index)
        groups = []
        for members in by_image.values():
            generator.shuffle(members)
            groups += chunks(members, self.share)
        generator.shuffle(groups)
        return [index for group in groups for index in group]


def _leave_interrupts_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal, and the parent's step needs its batches to end well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
