"""The loss and the perplexity of records with answers, as training's validation computes them.

Lesson: lessons/source/17_measuring.py.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanovlm.data.batches import CUDA_LENGTHS, Batches, BatchOptions, LoadedBatch, RecordEncoder
from nanovlm.data.records import Record
from nanovlm.evaluation.answers import other_images
from nanovlm.inputs.batch import Batch
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.utils.device import autocast

SHARE = 8  # samples of one image in a sequence, as training has it by default


class Loss(NamedTuple):
    """The cross entropy of all labelled tokens of some records."""

    total: float  # summed over the tokens
    tokens: int
    records: int

    @property
    def mean(self) -> float:
        """The cross entropy per labelled token, in nats."""
        return self.total / max(self.tokens, 1)

    @property
    def perplexity(self) -> float:
        """The exponential of the mean."""
        return perplexity(self.mean)


def perplexity(loss: float) -> float:
    """The exponential of a mean cross entropy; of more than 700 nats a float holds none."""
    return math.exp(min(loss, 700.0))


@torch.no_grad()
def sums_over(
    batches: Iterable[Batch], measure: Callable[[Batch], tuple[Tensor, Tensor]], metrics: int = 0
) -> list[float]:
    """The loss and the `metrics` other numbers that `measure` gives for a batch, over all of them.

    `measure` returns sums over a batch's targets: the loss, (), and the metrics, (metrics,). They
    are added up in float64, in the order of the batches.
    """
    sums = [0.0] * (1 + metrics)
    for batch in batches:
        loss, others = measure(batch)
        new = torch.cat((loss[None], others)).tolist()
        sums = [before + more for before, more in zip(sums, new)]
    return sums


def measure_loss(
    model: VisionLanguageModel,
    records: Sequence[Record],
    control: str = "none",
    batch_size: int = 32,
    max_length: int = 2048,
) -> Iterator[tuple[LoadedBatch, Loss]]:
    """The loss of `model` on records that end with an answer: each batch, and the loss up to it.

    control: as in `answer_records`. max_length: tokens of a record, above which its text is cut.
    A record that cannot be used is in `skipped` of its batch and has no part in the loss.
    """
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    if control == "shuffled":
        others = other_images(records)
        records = [
            dataclasses.replace(record, images=tuple(others[path] for path in record.images))
            for record in records
        ]
    options = BatchOptions(
        batch_size=batch_size,
        max_length=min(max_length, model.config.language_model.max_position_embeddings),
        share=SHARE,
        multiple=CUDA_LENGTHS if device.type == "cuda" else 1,
        shuffle=False,
    )

    def measure(batch: Batch) -> tuple[Tensor, Tensor]:
        if control == "blind" and batch.pixels is not None:
            batch.pixels.zero_()  # pixels are normalised, so zero is the mean colour
        with autocast(device, dtype):
            loss = model(batch.to(device))
        return loss, loss.new_zeros(0)

    batches = Batches(records, RecordEncoder.of(model), options)
    loss = Loss(0.0, 0, 0)
    for loaded in batches.loader(0, len(batches)):
        if loaded.batch is not None:
            (total,) = sums_over([loaded.batch], measure)
            targets = len(loaded.batch.targets)
            loss = Loss(loss.total + total, loss.tokens + targets, loss.records + loaded.samples)
        yield loaded, loss
