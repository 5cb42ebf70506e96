"""Pairs of answers of which one is preferred: reading them, and batches of them.

    {"image": "a.jpg", "prompt": "描述图片", "chosen": "…", "rejected": "…"}
    {"images": ["a.jpg", "b.jpg"], "messages": [{"role": "user", "content": "<image> <image> …"}],
     "chosen": "…", "rejected": "…"}

The question is that of any form of records (`nanovlm.data.forms`), without its answer. An answer is
text or a turn; or a list of turns, the question's among them if there is no other. In ms-swift's
form, the preferred answer stands where a record has its own, and the other one in
`rejected_response`. A prompt without `<image>` has its images at the beginning.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanovlm.data.batches import BatchOptions, RecordEncoder
from nanovlm.data.forms import QUESTIONS, TURN_LISTS, as_turns, present, repeats
from nanovlm.data.records import Images, Record, parse_record, read_records
from nanovlm.data.sequences import TokenSequence, share_prefix
from nanovlm.errors import NanoVLMError
from nanovlm.inputs.batch import Batch
from nanovlm.inputs.chat import IGNORED, Message
from nanovlm.inputs.image_config import ImageConfig

ANSWERS = ("chosen", "rejected")
REJECTED = "rejected_response"


def read_pairs(
    data: str | Path, images: str | Path | None = None
) -> tuple[list[Record], list[str]]:
    """All usable pairs of the files that `data` names, and a line for each one skipped.

    It works as `read_records` does. The record of a pair ends with the chosen answer and holds the
    rejected one as `rejected`.
    """
    return read_records(data, images, parse_pair)


def parse_pair(entry: Any, where: str, images: Images) -> Record:
    """Check one pair and resolve its image paths; raises with `where` and the reason."""
    if not isinstance(entry, dict):
        return parse_record(entry, where, images)  # which says what it is instead
    entry = _with_chosen(present(entry))
    for name in ANSWERS:
        answer = entry.get(name)
        if not (answer.strip() if isinstance(answer, str) else isinstance(answer, (list, dict))):
            raise NanoVLMError(
                f"{where}: has no text in {name!r}; a pair has a chosen and a rejected answer"
            )
    chosen, rejected = (parse_record(_with_answer(entry, name), where, images) for name in ANSWERS)
    if chosen.messages[:-1] != rejected.messages[:-1] or chosen.images != rejected.images:
        raise NanoVLMError(f"{where}: chosen and rejected do not answer the same question")
    if len(chosen.messages) < 2 or chosen.messages[-2].role != "user":
        raise NanoVLMError(f"{where}: the turn before the answers is not the user's")
    if not chosen.messages[-1].labelled or not rejected.messages[-1].labelled:
        raise NanoVLMError(f"{where}: one of the answers is not to be learned")
    better, worse = (record.messages[-1].text for record in (chosen, rejected))
    if better.strip() == worse.strip():
        raise NanoVLMError(f"{where}: chosen and rejected are the same")
    return dataclasses.replace(chosen, rejected=worse)


def _with_chosen(entry: dict[str, Any]) -> dict[str, Any]:
    """A pair of ms-swift's, whose preferred answer is a record's own, with `chosen` instead."""
    if REJECTED not in entry:
        return entry
    rest = {key: value for key, value in entry.items() if key not in (REJECTED, "response")}
    pair = {"chosen": entry.get("response"), "rejected": entry[REJECTED]}
    for key in TURN_LISTS:
        if isinstance(turns := entry.get(key), list):
            pair |= {key: turns[:-1], "chosen": turns[-1]}
    return {**rest, **pair}


def _with_answer(entry: dict[str, Any], name: str) -> dict[str, Any]:
    """The record that ends with one of a pair's answers."""
    answer, rest = entry[name], {k: v for k, v in entry.items() if k not in ANSWERS}
    if isinstance(answer, list) and len(answer) > 1:  # with the question
        return _with_conversation(rest, answer, entry["chosen"])
    for key in TURN_LISTS:
        if isinstance(turns := rest.get(key), list):
            return {**rest, key: [*turns, *as_turns(answer, "assistant")]}
    if any(key in rest for key in QUESTIONS):
        return {**rest, "completion": answer}
    return {**rest, "messages": as_turns(answer, "assistant")}


def _with_conversation(rest: dict[str, Any], turns: list[Any], chosen: Any) -> dict[str, Any]:
    """The record of an answer that is all turns, without what says them again (UltraFeedback).

    Other turns stay beside them, and the record is refused.
    """
    for key in (*TURN_LISTS, *QUESTIONS):
        if key in rest and (rest[key] in (chosen, turns[:-1]) or repeats(rest[key], turns)):
            rest.pop(key)
    return {**rest, next(key for key in TURN_LISTS if key not in rest): turns}


@dataclass
class PairBatch(Batch):
    """A batch of P pairs.

    Its targets are those of each pair's chosen answer, then of its rejected one, pair by pair.
    """

    # (2P,) number of targets of each answer
    lengths: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    # (P, 2) log-probabilities of both answers under the reference model, once they are known
    reference: Tensor = field(default_factory=lambda: torch.zeros(0, 2))

    @classmethod
    def of(cls, batch: Batch) -> "PairBatch":
        """`batch` itself, or, of a plain one, a batch of no pairs.

        With FSDP, a process without records takes part in a step with an empty plain batch.
        """
        return batch if isinstance(batch, cls) else cls(**vars(batch))


@dataclass
class PairEncoder:
    """Records for preference training: prompt and images once, then both answers as branches.

    The branches do not attend to each other, so the log-probability of an answer is what it is in a
    sequence by itself. Only the two answers are labelled, not those of earlier turns, which a pair
    has in common.
    """

    single: RecordEncoder  # for the prompt with one of the answers
    # Log-probabilities of both answers by the record's name; batches come without until it is set.
    reference: Mapping[str, Sequence[float]] | None = None

    @property
    def image(self) -> ImageConfig:
        return self.single.image

    @property
    def image_token_id(self) -> int:
        return self.single.image_token_id

    def encode(self, record: Record, options: BatchOptions) -> tuple[TokenSequence, bool]:
        """The pair as one sequence of two branches, the chosen answer first."""
        rejected = (*record.messages[:-1], Message.parse("assistant", record.rejected))
        chosen, chosen_is_cut = self._encode_answer(record, options)
        other, other_is_cut = self._encode_answer(
            dataclasses.replace(record, messages=rejected), options
        )
        is_cut = chosen_is_cut or other_is_cut
        if chosen.input_ids == other.input_ids:
            raise NanoVLMError(
                f"chosen and rejected are the same up to {options.max_length} tokens"
                + ("; raise --max-length" if is_cut else "")
            )
        if self.reference is not None and record.where not in self.reference:
            raise NanoVLMError(
                "could not be read when the reference's log-probabilities were computed"
            )
        (pair,) = share_prefix((chosen, other), self.image_token_id)
        if options.pack and len(pair) > options.pack:
            raise NanoVLMError(
                f"the pair takes {len(pair)} tokens and a row has {options.pack}; raise --pack"
            )
        return dataclasses.replace(pair, records=(record.where,)), is_cut

    def finish(self, batch: Batch, sequences: Sequence[TokenSequence]) -> PairBatch:
        """The batch with the number of targets of each answer, and the reference if it is known."""
        pairs = PairBatch.of(batch)
        lengths = []
        for sequence in sequences:
            # A chosen answer is branch 2 of its pair and the rejected one branch 3, so where the
            # number changes, the answer does.
            labelled = [
                number
                for number, label in zip(sequence.attention_mask, sequence.labels)
                if label != IGNORED
            ]
            lengths += [len(list(answer)) for _, answer in groupby(labelled)]
        pairs.lengths = torch.tensor(lengths)
        if self.reference is not None:
            names = [record for sequence in sequences for record in sequence.records]
            pairs.reference = torch.tensor([self.reference[name] for name in names])
        return pairs

    def _encode_answer(self, record: Record, options: BatchOptions) -> tuple[TokenSequence, bool]:
        """The record without labels before the last run of them, which is its last answer."""
        sequence, is_cut = self.single.encode(record, options)
        start = max(i for i, label in enumerate(sequence.labels) if label != IGNORED)
        while start and sequence.labels[start - 1] != IGNORED:
            start -= 1
        labels = [IGNORED] * start + sequence.labels[start:]
        return dataclasses.replace(sequence, labels=labels), is_cut
