"""The batch of each step of a run, prepared ahead of it.

Batch number i is a function of the records, the options and i alone. So a run can stop anywhere and
go on at the next batch, any number of worker processes prepare the same batches, and of several
processes that train together each knows its part of every step without asking the others.
"""

import dataclasses
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor
from torch.utils.data import Dataset

from nanovlm.data.collate import collate
from nanovlm.data.order import Order
from nanovlm.data.packing import PackedSequence, cut_by_length, deal, first_fit_decreasing, join
from nanovlm.data.records import Record
from nanovlm.data.sequences import TokenSequence, share_prefixes
from nanovlm.data.workers import IN_THIS_PROCESS, Loading, prepare_ahead
from nanovlm.errors import NanoVLMError
from nanovlm.inputs.batch import Batch
from nanovlm.inputs.chat import IGNORED, Chat, ImageTokens
from nanovlm.inputs.image import image_pixels, image_size, open_image, tile_grid
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.model.vlm import VisionLanguageModel

CUDA_LENGTHS = 64  # rows are padded to a multiple of it: no kernel gets ragged or unaligned rows


@dataclass(frozen=True)
class BatchOptions:
    """How records are put into batches (`Batches`)."""

    batch_size: int  # records that one process takes for a batch
    max_length: int  # tokens of a sample, above which its end is cut off
    share: int = 1  # how many samples of one image may share a prefix
    pack: int = 0  # tokens of a row into which several sequences are packed; 0: no packing
    bucket: int = 1  # batches whose records are sorted by length or packed together
    multiple: int = 1  # what the length of a batch's rows is a multiple of
    shuffle: bool = True
    seed: int = 0
    rank: int = 0  # this process's number, of `world`
    world: int = 1

    @property
    def sample_limit(self) -> tuple[int, str]:
        """The most tokens of a sample, and the flag that sets it."""
        if 0 < self.pack < self.max_length:
            return self.pack, "--pack"
        return self.max_length, "--max-length"


class Encoder(Protocol):
    """What `Batches` needs to know of a kind of records.

    `RecordEncoder` is for supervised training, `PairEncoder` for preferences.
    """

    @property
    def image(self) -> ImageConfig: ...

    @property
    def image_token_id(self) -> int: ...

    def encode(self, record: Record, options: BatchOptions) -> tuple[TokenSequence, bool]:
        """The record as a sequence, and whether its text was cut. Raises with the bare reason."""
        ...

    def finish(self, batch: Batch, sequences: Sequence[TokenSequence]) -> Batch:
        """The collated batch, with what this kind of record adds to it."""
        ...


@dataclass(frozen=True)
class RecordEncoder:
    """Records for supervised training, in which every answer is labelled."""

    chat: Chat
    image: ImageConfig
    image_length: int  # visual tokens of a tile

    @classmethod
    def of(cls, model: VisionLanguageModel) -> "RecordEncoder":
        """What to know of a model to encode records for it, without its weights."""
        return cls(model.chat, model.config.image, model.image_length)

    @property
    def image_token_id(self) -> int:
        return self.chat.image_token_id

    def encode(self, record: Record, options: BatchOptions) -> tuple[TokenSequence, bool]:
        """The conversation, cut at the end where it is too long; its images are never cut."""
        images = [self.image_tokens(path) for path in record.images]
        sample = self.chat.encode(record.messages, images)
        limit, flag = options.sample_limit
        is_cut = len(sample.input_ids) > limit
        if is_cut:
            if self.image_token_id in sample.input_ids[limit:]:
                raise NanoVLMError(
                    f"an image lies beyond {limit} tokens and an image is never cut; raise {flag}"
                )
            del sample.input_ids[limit:], sample.labels[limit:]
        if all(label == IGNORED for label in sample.labels):
            raise NanoVLMError(f"no word of an answer lies within {limit} tokens; raise {flag}")
        return TokenSequence.of(sample, record.images, record.where), is_cut

    def finish(self, batch: Batch, sequences: Sequence[TokenSequence]) -> Batch:
        return batch

    def image_tokens(self, path: Path) -> ImageTokens:
        """The placeholders of an image.

        Where it is cut into tiles, they depend on its size, which is read from the file's header.
        """
        if self.image.fit != "tiles":
            return ImageTokens(self.image_length)
        return ImageTokens(self.image_length, *tile_grid(*image_size(path), self.image))


@dataclass
class LoadedBatch:
    """A batch, the records in it, and why others are not."""

    batch: Batch | None  # None if all its records were skipped, or all are other processes'
    records: list[str] = field(default_factory=list)  # their names, in the order of the rows
    tokens: int = 0  # without padding
    skipped: list[str] = field(default_factory=list)  # a line for each
    cut: list[str] = field(default_factory=list)  # names of records whose text was cut at the end
    slots: int = 0  # tokens that the batch has room for, B · T: tokens / slots is its fill rate
    images: int = 0

    @property
    def samples(self) -> int:
        """Records in the batch."""
        return len(self.records)

    def pin_memory(self) -> "LoadedBatch":
        """Called by the loader where batches go on to a GPU."""
        if self.batch is None:
            return self
        return dataclasses.replace(self, batch=self.batch.pin_memory())


@dataclass
class _Bucket:
    """Records that were encoded together, laid out as the rows of `bucket` batches."""

    number: int
    batches: list[list[PackedSequence]]
    skipped: list[str]
    cut: list[str]


class Batches(Dataset):
    """The batches of a run, by number.

    `bucket` · `batch_size` · `world` records that follow each other in the `Order` are encoded at a
    time:

    - with `bucket` = 1 and no packing, a process takes its `batch_size` of them, in order;
    - with `bucket` > 1, they are sorted by length and cut into `bucket` batches for all processes,
      in shuffled order;
    - with `pack`, they are packed into rows of up to that many tokens, which are divided among
      `bucket` batches.

    The latter two then divide the rows of a batch among the processes by tokens. So batch i of all
    processes together holds the same records for any `world` with the same `batch_size` · `world`;
    about that many without packing, and exactly that many over a bucket. A process may get none, if
    there are fewer rows than processes. Every process and worker encodes the whole bucket, and
    decodes the images of its own batches only.
    """

    def __init__(
        self,
        records: Sequence[Record],
        encoder: Encoder,
        options: BatchOptions,
        features: Mapping[Path, Tensor] | None = None,
    ) -> None:
        """`features` are the (n, P, C_v) patch vectors of each image, to use in place of pixels."""
        self.records, self.encoder, self.options = records, encoder, options
        # No bucket reaches beyond the data: it would hold records more than once.
        self.options = dataclasses.replace(options, bucket=max(1, min(options.bucket, len(self))))
        self.features = features
        self._order = Order(records, options.share, options.seed, options.shuffle)
        self._bucket: _Bucket | None = None  # the last one asked for

    def __len__(self) -> int:
        """Batches that take every record once."""
        return math.ceil(len(self.records) / (self.options.batch_size * self.options.world))

    def __getitem__(self, number: int) -> LoadedBatch:
        options = self.options
        if not options.pack and options.bucket == 1:
            first = (number * options.world + options.rank) * options.batch_size
            sequences, skipped, cut = self._encode(first, options.batch_size)
            rows = [[sequence] for sequence in self._share(sequences, options.share)]
            return self._load(rows, skipped, cut)
        number, place = divmod(number, options.bucket)
        if self._bucket is None or self._bucket.number != number:
            self._bucket = self._lay_out(number)
        rows = deal(self._bucket.batches[place], options.world)[options.rank]
        is_first = place == options.rank == 0  # which alone names the records that are skipped
        return self._load(rows, self._bucket.skipped if is_first else [], self._bucket.cut)

    def loader(
        self, first: int, last: int, loading: Loading = IN_THIS_PROCESS
    ) -> Iterator[LoadedBatch]:
        """Batches `first` to `last` - 1 in order, each when asked for or in advance (`loading`)."""
        return prepare_ahead(self, first, last, loading)

    def _lay_out(self, number: int) -> _Bucket:
        """Encode the records of a bucket and divide them among its batches."""
        options = self.options
        size = options.batch_size * options.world  # records in a batch of all processes
        sequences, skipped, cut = self._encode(
            number * options.bucket * size, options.bucket * size
        )
        count = options.bucket
        if not options.shuffle:  # the last bucket may have fewer records
            count = math.ceil((len(sequences) + len(skipped)) / size)
        shared = self._share(sequences, min(options.share, size))
        if options.pack:
            batches = deal(first_fit_decreasing(shared, options.pack), count)
        else:
            batches = cut_by_length([[sequence] for sequence in shared], count)
        if options.shuffle:
            random.Random(f"{options.seed}/window {number}").shuffle(batches)
        return _Bucket(number, batches, skipped, cut)

    def _encode(self, first: int, count: int) -> tuple[list[TokenSequence], list[str], list[str]]:
        """Encode `count` records from position `first` on.

        Returns sequences, a line for each record that is skipped, and the names of those cut.
        """
        sequences, skipped, cut = [], [], []
        last = first + count
        if not self.options.shuffle:  # read once, for the validation loss, and not over and over
            last = min(last, len(self.records))
        for position in range(first, last):
            record = self.records[self._order[position]]
            try:
                sequence, is_cut = self.encoder.encode(record, self.options)
            except NanoVLMError as error:
                skipped.append(f"{record.where}: {error}")
                continue
            sequences.append(sequence)
            cut += [record.where] if is_cut else []
        return sequences, skipped, cut

    def _share(self, sequences: Sequence[TokenSequence], at_most: int) -> list[TokenSequence]:
        return share_prefixes(
            sequences, self.encoder.image_token_id, at_most, longest=self.options.pack
        )

    def _load(
        self, rows: Sequence[PackedSequence], skipped: Sequence[str], cut: Sequence[str]
    ) -> LoadedBatch:
        """Decode the images of `rows` and make the batch.

        Sequences whose images cannot be read are left out and named.
        """
        skipped = list(skipped)
        images: dict[Path, Tensor] = {}
        sequences = []
        for row in rows:
            readable = []
            for sequence in row:
                try:
                    for path in sequence.images:
                        if path not in images:
                            images[path] = self._load_image(path)
                    readable.append(sequence)
                except NanoVLMError as error:
                    skipped += [f"{record}: {error}" for record in sequence.records]
            sequences += [join(readable)] if readable else []
        if not sequences:
            return LoadedBatch(None, skipped=skipped)
        loaded = [images[path] for sequence in sequences for path in sequence.images]
        pixels, patches = (loaded, []) if self.features is None else ([], loaded)
        batch = collate(
            sequences,
            self.encoder.image_token_id,
            pixels,
            patches=patches,
            multiple=self.options.multiple,
        )
        records = [record for sequence in sequences for record in sequence.records]
        return LoadedBatch(
            batch=self.encoder.finish(batch, sequences),
            records=records,
            tokens=sum(map(len, sequences)),
            skipped=skipped,
            cut=[record for record in cut if record in records],
            slots=batch.input_ids.numel(),
            images=len(loaded),
        )

    def _load_image(self, path: Path) -> Tensor:
        """The pixels of an image's tiles (n, 3, H, W), or their patch vectors (n, P, C_v)."""
        if self.features is None:
            return image_pixels(open_image(path), self.encoder.image)
        if path not in self.features:
            raise NanoVLMError(f"image {path} could not be read")
        return self.features[path]
