"""The batch that each step of a run takes, prepared ahead of it.

Batch number i is a function of the records, the seed and i alone. So a run can stop anywhere and go on at the next
batch, and any number of worker processes prepare the same ones; of several processes that train together, each knows
its part of every step without asking the others.
"""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nanovlm.data.order import Order
from nanovlm.data.packing import PackedSequence, cut_by_length, deal, first_fit_decreasing, join
from nanovlm.data.records import Record
from nanovlm.data.sequences import Sample, TokenSequence, chunks, collate, share_prefix
from nanovlm.data.workers import prepare_ahead
from nanovlm.errors import NanoVLMError
from nanovlm.inputs.batch import Batch
from nanovlm.inputs.chat import IGNORED, Chat, ImageTokens
from nanovlm.inputs.image import image_pixels, image_size, open_image, tile_grid
from nanovlm.inputs.image_config import ImageConfig


@dataclass
class LoadedBatch:
    """A batch, the records in it, and why others are not."""

    batch: (
        Batch | None
    )  # None when every record of it had to be skipped, or other processes have all there is
    records: list[str] = field(default_factory=list)  # by name, in the order of the rows
    tokens: int = 0  # without padding
    skipped: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)  # records whose text was cut at the end
    slots: int = 0  # tokens that the batch has room for, B · T: tokens / slots is its fill rate
    images: int = 0

    @property
    def samples(self) -> int:
        return len(self.records)

    def pin_memory(self) -> "LoadedBatch":
        """What the loader calls where batches go on to a GPU."""
        return (
            self if self.batch is None else dataclasses.replace(self, batch=self.batch.pin_memory())
        )


@dataclass
class Window:
    """Records that were read together, laid out for `bucket` batches of all processes."""

    number: int
    batches: list[list[PackedSequence]]
    skipped: list[str]
    cut: list[str]


class Batches(Dataset):
    """The batches of a run, by number.

    Batches are made from a window of `bucket` · `batch_size` · `world` records that follow each other in the `Order`:

    - with `bucket` = 1 and no packing, a process takes its `batch_size` of them, in order;
    - with `bucket` > 1, they are sorted by length and cut into `bucket` batches for all processes, in shuffled order;
    - with `pack`, they are packed into rows of up to that many tokens, which are dealt out to `bucket` batches.

    The latter two then deal the rows of a batch to the processes by tokens. So batch i of all processes together holds
    the same records for any `world` with the same `batch_size` · `world`; without packing about that many, and over a
    window exactly. A process may get none, where there are fewer rows than processes. Every process and worker
    tokenizes the whole window, and decodes the images of its own batches only.
    """

    def __init__(
        self,
        records: Sequence[Record],
        chat: Chat,
        image: ImageConfig,
        image_length: int,
        *,
        batch_size: int,
        share: int,
        max_length: int,
        seed: int,
        shuffle: bool = True,
        pack: int = 0,
        bucket: int = 1,
        rank: int = 0,
        world: int = 1,
        features: "dict[Path, Tensor] | None" = None,
    ) -> None:
        """`image_length` is the number of visual tokens a picture takes. `batch_size` is the number of records that one
        process takes. `share` is how many samples of one image may share a row. `features` are patch vectors to use in
        place of pixels, (n, P, C_v) an image. This process is number `rank` of `world`."""
        self.records, self.chat, self.image, self.image_length = records, chat, image, image_length
        self.batch_size, self.share, self.max_length = batch_size, share, max_length
        self.seed, self.shuffle, self.features = seed, shuffle, features
        self.pack, self.bucket, self.rank, self.world = pack, bucket, rank, world
        self._order = Order(records, share, seed, shuffle)
        self._window: Window | None = None  # the last one asked for

    def __len__(self) -> int:
        """Batches that take every record once."""
        return -(-len(self.records) // (self.batch_size * self.world))

    def __getitem__(self, number: int) -> LoadedBatch:
        if not self.pack and self.bucket == 1:
            samples, skipped, cut = self._read(
                (number * self.world + self.rank) * self.batch_size, self.batch_size
            )
            return self._load([[row] for row in self._share(samples, self.share)], skipped, cut)
        number, place = divmod(number, self.bucket)
        if self._window is None or self._window.number != number:
            self._window = self._plan(number)
        lines = deal(self._window.batches[place], self.world)[self.rank]
        return self._load(
            lines, self._window.skipped if place == self.rank == 0 else [], self._window.cut
        )

    def loader(
        self, first: int, last: int, workers: int, pin_memory: bool = False
    ) -> Iterator[LoadedBatch]:
        """Batches `first` to `last` - 1 in order, prepared by `workers` processes (`prepare_ahead`)."""
        return prepare_ahead(self, first, last, workers, pin_memory)

    def _plan(self, number: int) -> Window:
        """Read a window and lay it out."""
        size = self.batch_size * self.world  # of a batch of all processes
        samples, skipped, cut = self._read(number * self.bucket * size, self.bucket * size)
        rows = self._share(samples, min(self.share, size))
        count = self.bucket if self.shuffle else -(-(len(samples) + len(skipped)) // size)
        if self.pack:
            batches = deal(first_fit_decreasing(rows, self.pack), count)
        else:
            batches = cut_by_length([[row] for row in rows], count)
        if self.shuffle:
            random.Random(f"{self.seed}/window {number}").shuffle(batches)
        return Window(number, batches, skipped, cut)

    def _read(self, first: int, count: int) -> tuple[list[Sample], list[str], list[str]]:
        """Tokenize `count` records from position `first` on: samples, why others are none, and which ones were cut."""
        samples, skipped, cut = [], [], []
        # Unshuffled records are read once, for the validation loss; shuffled ones over and over.
        last = first + count if self.shuffle else min(first + count, len(self.records))
        for position in range(first, last):
            record = self.records[self._order[position]]
            try:
                sample, is_cut = self._encode(record)
            except NanoVLMError as error:
                skipped.append(f"{record.where}: {error}")
                continue
            samples.append(sample)
            cut += [record.where] if is_cut else []
        return samples, skipped, cut

    def _encode(self, record: Record) -> tuple[Sample, bool]:
        encoded = self.chat.encode(
            record.messages, [self._image_tokens(path) for path in record.images]
        )
        packed_tighter = 0 < self.pack < self.max_length
        limit, flag = (self.pack, "--pack") if packed_tighter else (self.max_length, "--max-length")
        truncated = len(encoded.input_ids) > limit
        if truncated:
            if self.chat.image_token_id in encoded.input_ids[limit:]:
                raise NanoVLMError(
                    f"an image lies beyond {limit} tokens and an image is never cut; raise {flag}"
                )
            del encoded.input_ids[limit:], encoded.labels[limit:]
        if all(label == IGNORED for label in encoded.labels):
            raise NanoVLMError(f"no word of an answer lies within {limit} tokens; raise {flag}")
        return Sample(encoded, record.images, record.where), truncated

    def _image_tokens(self, path: Path) -> ImageTokens:
        """An image's placeholders. Where it is cut into tiles they depend on its size, which its header says."""
        if self.image.fit != "tiles":
            return ImageTokens(self.image_length)
        return ImageTokens(self.image_length, *tile_grid(*image_size(path), self.image))

    def _share(self, samples: Sequence[Sample], share: int) -> list[TokenSequence]:
        """Samples in order as rows; up to `share` that follow each other with the same images in one, if it fits `pack`."""
        rows = []
        for _, group in groupby(samples, key=lambda sample: sample.images):
            for chunk in chunks(list(group), share):
                shared = share_prefix(chunk, self.chat.image_token_id)
                if self.pack and any(len(row) > self.pack for row in shared):
                    shared = self._share(chunk, len(chunk) // 2)
                rows += shared
        return rows

    def _load(
        self, lines: Sequence[PackedSequence], skipped: Sequence[str], cut: Sequence[str]
    ) -> LoadedBatch:
        """Decode the images of `lines` and make the batch; samples whose images cannot be read are left out and named."""
        skipped, pixels, rows = list(skipped), {}, []
        for line in lines:
            readable = []
            for row in line:
                try:
                    pixels |= {
                        path: self._look_up(path) for path in row.images if path not in pixels
                    }
                    readable.append(row)
                except NanoVLMError as error:
                    skipped += [f"{record}: {error}" for record in row.records]
            rows += [join(readable)] if readable else []
        if not rows:
            return LoadedBatch(None, skipped=skipped)
        batch = collate(rows, self.chat.image_token_id)
        if images := [pixels[path] for row in rows for path in row.images]:
            pictures = torch.cat(images)
            batch.patches, batch.pixels = (
                (pictures, None) if self.features is not None else (None, pictures)
            )
        records = [record for row in rows for record in row.records]
        cut = [record for record in cut if record in records]
        return LoadedBatch(
            batch, records, sum(map(len, rows)), skipped, cut, batch.input_ids.numel(), len(images)
        )

    def _look_up(self, path: Path) -> Tensor:
        """An image's pictures, or what the eyes see in them."""
        if self.features is None:
            return image_pixels(open_image(path), self.image)
        if path not in self.features:
            raise NanoVLMError(f"image {path} could not be read")
        return self.features[path]
