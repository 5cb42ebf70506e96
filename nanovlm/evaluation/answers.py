"""A model's answers to records, many at a time, with the image as it is or under a control.

Lessons: lessons/source/00_does_it_see.py, lessons/source/17_measuring.py.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from nanovlm.data.collate import prepare
from nanovlm.data.records import MAX_NAMED, Record
from nanovlm.errors import NanoVLMError
from nanovlm.evaluation.metrics import exact_match, same_items
from nanovlm.generate import generate
from nanovlm.inputs.chat import Message
from nanovlm.inputs.image import open_image
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.sampling import Sampling
from nanovlm.utils.console import say

CONTROLS = ("none", "blind", "shuffled")

Given = TypeVar("Given")


def answer_records(
    model: VisionLanguageModel,
    records: Sequence[Record],
    max_new_tokens: int = 64,
    batch_size: int = 32,
    control: str = "none",
    sampling: Sampling = Sampling(),
) -> Iterator[str | None]:
    """Answer each record's last question, in order.

    A closing assistant turn is left out of the prompt. A record that cannot be answered, because
    its image is broken or its prompt too long, is named on stderr and gives None. Raises
    NanoVLMError once MAX_NAMED records could not be answered and none could.

    `control="blind"` replaces every image by its mean colour; `"shuffled"` gives each question
    another image of the same file. What a model still gets right then does not come from the image.
    Without `sampling`, answers are greedy.
    """
    if control not in CONTROLS:
        raise NanoVLMError(f"control {control!r} is not known; take one of {', '.join(CONTROLS)}")
    others = other_images(records) if control == "shuffled" else {}

    def answer(part: Sequence[Record]) -> list[str]:
        prompts = [prompt_of(record) for record in part]
        images = [(open_image(others.get(path, path)) for path in record.images) for record in part]
        batch = prepare(model, prompts, images, add_generation_prompt=True)
        if control == "blind" and batch.pixels is not None:
            batch.pixels.zero_()  # pixels are normalised, so zero is the mean colour
        batch = batch.to(next(model.parameters()).device)
        answers = generate(model, batch, max_new_tokens, sampling)
        return [model.tokenizer.decode(tokens, skip_special=True).strip() for tokens in answers]

    return in_batches(answer, records, batch_size)


def in_batches(
    answer: Callable[[Sequence[Record]], list[Given]], records: Sequence[Record], batch_size: int
) -> Iterator[Given | None]:
    """What `answer` gives for each record; those of a batch that fails are tried one by one.

    Which records give None, and when it raises, `answer_records` says.
    """
    num_answered = num_skipped = 0
    for start in range(0, len(records), batch_size):
        part = records[start : start + batch_size]
        try:
            answers: list[Given | None] = [*answer(part)]
        except NanoVLMError:
            answers = []
            for record in part:
                try:
                    answers += answer([record])
                except NanoVLMError as error:
                    answers.append(None)
                    num_skipped += 1
                    if num_skipped <= MAX_NAMED:
                        say(f"skipped: {record.where}: {error}")
                    elif not num_answered:
                        raise
        num_answered += len(answers) - answers.count(None)
        yield from answers


def other_images(records: Sequence[Record], seed: int = 0) -> dict[Path, Path]:
    """For each image another one, each used once."""
    images = sorted({path for record in records for path in record.images})
    random.Random(seed).shuffle(images)
    if len(images) < 2:
        raise NanoVLMError("the shuffled control needs records of two images or more")
    return dict(zip(images, images[1:] + images[:1]))


def references_of(record: Record) -> list[str]:
    """The right answers: the record's references, or its closing assistant turn."""
    if record.references:
        return list(record.references)
    return [record.messages[-1].text]


def is_description(record: Record) -> bool:
    """Whether the record asks for all objects of a scene, which an answer may list in any order."""
    return record.extra.get("kind") == "describe"


def is_right(record: Record, answer: str) -> bool:
    """Whether `answer` equals a right one: `same_items` for a description, else `exact_match`."""
    right = same_items if is_description(record) else exact_match
    return right(answer, references_of(record))


def prompt_of(record: Record) -> tuple[Message, ...]:
    """The turns up to the last question."""
    return record.messages[:-1] if record.messages[-1].role == "assistant" else record.messages
