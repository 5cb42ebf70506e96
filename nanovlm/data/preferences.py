"""Pairs of answers of which one is preferred: reading them, and batches in which a pair shares a row.

    {"image": "a.jpg", "prompt": "描述图片", "chosen": "…", "rejected": "…"}
    {"images": ["a.jpg", "b.jpg"], "messages": [{"role": "user", "content": "<image> <image> …"}, …], "chosen": "…", …}

In place of `prompt`, `messages` or `conversations` hold several turns, of which the last is the user's. A prompt that
does not say with `<image>` where its images go has them at its beginning.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanovlm.data.batches import Batches, LoadedBatch
from nanovlm.data.packing import PackedSequence
from nanovlm.data.records import Record, parse_record, read_records
from nanovlm.data.sequences import Sample, TokenSequence, share_prefix
from nanovlm.errors import NanoVLMError
from nanovlm.inputs.batch import Batch
from nanovlm.inputs.chat import IGNORED, IMAGE_MARKER, Encoded, Message

ANSWERS = ("chosen", "rejected")


def read_pairs(
    data: str | Path, images: str | Path | None = None
) -> tuple[list[Record], list[str]]:
    """All usable pairs of the files that `data` names, and a line for each one skipped; otherwise as `read_records`.

    The record of a pair ends with the chosen answer and holds the rejected one as `rejected`.
    """
    return read_records(data, images, parse_pair)


def parse_pair(entry: Any, where: str, folder: Path) -> Record:
    """Check one pair and resolve its image paths; raises with `where` and the reason."""
    if not isinstance(entry, dict):
        return parse_record(entry, where, folder)  # which says what it is instead
    rest = {key: value for key, value in entry.items() if key not in (*ANSWERS, "prompt")}
    for name in ANSWERS:
        if not isinstance(entry.get(name), str) or not entry[name].strip():
            raise NanoVLMError(
                f"{where}: has no text in {name!r}; a pair has a chosen and a rejected answer"
            )
    if entry["chosen"].strip() == entry["rejected"].strip():
        raise NanoVLMError(f"{where}: chosen and rejected are the same")
    if "prompt" in entry:
        if "messages" in entry or "conversations" in entry or "references" in entry:
            raise NanoVLMError(f"{where}: has a prompt and other turns; give one of them")
        rest["messages"] = [{"role": "user", "content": _with_markers(entry)}]
    llava = "messages" not in rest
    answer = (
        {"from": "gpt", "value": entry["chosen"]}
        if llava
        else {"role": "assistant", "content": entry["chosen"]}
    )
    turns = rest.get("conversations" if llava else "messages")
    if not isinstance(turns, list):
        raise NanoVLMError(f"{where}: has no prompt, messages or conversations")
    record = parse_record(
        {**rest, "conversations" if llava else "messages": [*turns, answer]}, where, folder
    )
    if len(record.messages) < 2 or record.messages[-2].role != "user":
        raise NanoVLMError(f"{where}: the turn before the answers is not the user's")
    return dataclasses.replace(record, rejected=entry["rejected"])


def _with_markers(entry: dict[str, Any]) -> Any:
    """The prompt with a place for each image; what is no text is for others to complain about."""
    prompt, images = entry["prompt"], entry.get("images", entry.get("image")) or []
    if (
        not isinstance(prompt, str)
        or not isinstance(images, (str, list))
        or not images
        or IMAGE_MARKER in prompt
    ):
        return prompt
    return IMAGE_MARKER * (1 if isinstance(images, str) else len(images)) + "\n" + prompt


@dataclass
class PairBatch(Batch):
    """A batch of P pairs. Its targets are those of each pair's chosen answer, then of its rejected one, pair by pair."""

    lengths: Tensor = field(
        default_factory=lambda: torch.zeros(0, dtype=torch.int64)
    )  # (2P,) targets of each answer
    reference: Tensor = field(
        default_factory=lambda: torch.zeros(0, 2)
    )  # (P, 2) both answers' log-probabilities, once known

    @classmethod
    def of(cls, batch: Batch) -> "PairBatch":
        """The batch itself, or a plain one as one without pairs: an empty one, with which a process runs along (fsdp)."""
        return batch if isinstance(batch, cls) else cls(**vars(batch))


class PairBatches(Batches):
    """`Batches` of pairs: prompt and images once, then both answers as branches that do not see each other.

    So an answer's log-probability is what it would be in a row of its own. Only the answers are labelled, not those of
    earlier turns, which are a pair's in common. `reference` are both answers' log-probabilities by the record's name;
    batches come without them until it is set.
    """

    reference: Mapping[str, Sequence[float]] | None = None

    def _encode(self, record: Record) -> tuple[TokenSequence, bool]:
        """The pair as one row, and whether an answer was cut."""
        rejected = (*record.messages[:-1], Message.parse("assistant", record.rejected))
        samples, cut = [], False
        for messages in (record.messages, rejected):
            sample, is_cut = super()._encode(dataclasses.replace(record, messages=messages))
            samples.append(
                Sample(_last_answer_labelled(sample.encoded), sample.images, sample.record)
            )
            cut = cut or is_cut
        if samples[0].encoded.input_ids == samples[1].encoded.input_ids:
            raise NanoVLMError(
                f"chosen and rejected are the same up to {self.max_length} tokens"
                + ("; raise --max-length" if cut else "")
            )
        if self.reference is not None and record.where not in self.reference:
            raise NanoVLMError(
                "could not be read when the reference's log-probabilities were computed"
            )
        (row,) = share_prefix(samples, self.chat.image_token_id)
        if self.pack and len(row) > self.pack:
            raise NanoVLMError(
                f"the pair takes {len(row)} tokens and a row has {self.pack}; raise --pack"
            )
        return dataclasses.replace(row, records=(record.where,)), cut

    def _share(self, samples: Sequence[TokenSequence], share: int) -> list[TokenSequence]:
        """Pairs are rows already."""
        return list(samples)

    def _load(
        self, lines: Sequence[PackedSequence], skipped: Sequence[str], cut: Sequence[str]
    ) -> LoadedBatch:
        loaded = super()._load(lines, skipped, cut)
        if loaded.batch is None:
            return loaded
        batch = PairBatch.of(loaded.batch)
        # In its row or segment, a chosen answer is branch 2 and a rejected one 3: where the number changes, so does the answer.
        branches = batch.attention_mask.flatten()[batch.target_positions + 1]
        batch.lengths = branches.unique_consecutive(return_counts=True)[1]
        if self.reference is not None:
            batch.reference = torch.tensor([self.reference[where] for where in loaded.records])
        return dataclasses.replace(loaded, batch=batch)


def _last_answer_labelled(encoded: Encoded) -> Encoded:
    """The same without labels before the last run of them, which is the last answer."""
    end = max(place for place, label in enumerate(encoded.labels) if label != IGNORED) + 1
    start = end
    while start and encoded.labels[start - 1] != IGNORED:
        start -= 1
    return Encoded(encoded.input_ids, [IGNORED] * start + encoded.labels[start:])
