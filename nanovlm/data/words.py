"""The words of images' captions: which of them are learned, and batches of images with them.

All answers about an image are its captions, whatever they answer. A word is a token of the language
model's tokenizer, so words of any language are found without a list of them.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nanovlm.data.batches import BatchOptions, RecordEncoder
from nanovlm.data.records import Record
from nanovlm.data.sequences import TokenSequence
from nanovlm.errors import NanoVLMError
from nanovlm.inputs.batch import Batch
from nanovlm.inputs.chat import IGNORED
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.tokenizer import Tokenizer

Counts = Counter[int]  # token id → how many of an image's captions have it


def by_image(records: Sequence[Record]) -> list[Record]:
    """One record for each image, or tuple of images, with the turns of all its records.

    Records without an image have no part in it.
    """
    groups: dict[tuple[Path, ...], list[Record]] = defaultdict(list)
    for record in records:
        groups[record.images].append(record)
    groups.pop((), None)
    return [
        dataclasses.replace(group[0], messages=tuple(turn for it in group for turn in it.messages))
        for group in groups.values()
    ]


def count_words(record: Record, tokenizer: Tokenizer) -> Counts:
    """The tokens of a record's captions, each with the number of captions that have it."""
    captions = (turn.text for turn in record.messages if turn.role == "assistant" and turn.labelled)
    return Counter(token for text in captions for token in set(tokenizer.encode(text)))


@dataclass(frozen=True)
class Vocabulary:
    """The W words that are learned.

    tokens: their ids, ascending.
    frequency: of each, the share of the images that have it in a caption.
    """

    tokens: Sequence[int] = ()
    frequency: Sequence[float] = ()

    @classmethod
    def of(cls, images: Iterable[Counts], in_images: int, at_most: int) -> "Vocabulary":
        """The `at_most` most frequent of the words that occur in at least `in_images` of `images`.

        Frequencies count one more image with every word and one without any, so that none is 0 or
        1 (Laplace's rule of succession).
        """
        occurrences, count = Counter[int](), 0
        for counts in images:
            count += 1
            occurrences.update(counts.keys())
        enough = [token for token, number in occurrences.items() if number >= in_images]
        tokens = sorted(sorted(enough, key=lambda token: (-occurrences[token], token))[:at_most])
        return cls(tokens, [(occurrences[token] + 1) / (count + 2) for token in tokens])

    def __len__(self) -> int:
        return len(self.tokens)

    def texts(self, tokenizer: Tokenizer) -> list[str]:
        """Each word as text. A token may be a part of a character, which shows as �."""
        return [tokenizer.decode([token]).strip() for token in self.tokens]


@dataclass
class WordBatch(Batch):
    """A batch of B records: the visual tokens of each, and the words of its captions.

    `input_ids` hold nothing but the placeholders of images, since no text is read.
    """

    counts: Tensor = field(default_factory=lambda: torch.zeros(0, 0))  # (B, W) of captions
    lengths: tuple[int, ...] = ()  # B numbers of visual tokens, on the CPU


@dataclass
class WordEncoder:
    """Records for learning words: the images of each, and how many captions have which words."""

    single: RecordEncoder
    vocabulary: Vocabulary
    counts: Mapping[str, Counts]  # by the record's name

    @property
    def image(self) -> ImageConfig:
        return self.single.image

    @property
    def image_token_id(self) -> int:
        return self.single.image_token_id

    def encode(self, record: Record, options: BatchOptions) -> tuple[TokenSequence, bool]:
        """The placeholders of the record's images; nothing is cut."""
        tiles = (self.single.image_tokens(path).num_tiles for path in record.images)
        length = sum(tiles) * self.single.image_length
        ids, labels, mask = [self.image_token_id] * length, [IGNORED] * length, [1] * length
        return TokenSequence(ids, labels, mask, record.images, (record.where,)), False

    def finish(self, batch: Batch, sequences: Sequence[TokenSequence]) -> WordBatch:
        """The batch with the words of each record."""
        place = {token: number for number, token in enumerate(self.vocabulary.tokens)}
        counts = torch.zeros(len(sequences), len(place))
        for row, sequence in zip(counts, sequences):
            for token, count in self.counts[sequence.records[0]].items():
                if token in place:
                    row[place[token]] = count
        return WordBatch(**vars(batch), counts=counts, lengths=tuple(map(len, sequences)))


def word_encoder(
    single: RecordEncoder,
    records: Sequence[Record],
    held_out: Sequence[Record],
    in_images: int,
    at_most: int,
) -> WordEncoder:
    """The encoder of both; the words are those of `records`. Raises if there are none."""
    tokenizer = single.chat.tokenizer
    counts = {record.where: count_words(record, tokenizer) for record in (*records, *held_out)}
    learned = (counts[record.where] for record in records)
    vocabulary = Vocabulary.of(learned, in_images, at_most)
    if not vocabulary.tokens:
        raise NanoVLMError(
            f"no word occurs in the captions of {in_images} of the {len(records)} images; "
            "lower --word-images, or give more images"
        )
    return WordEncoder(single, vocabulary, counts)
