"""What the readers of benchmarks share: a question, its image, its options."""

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanovlm.data.records import Record
from nanovlm.data.tables import rows
from nanovlm.errors import NanoVLMError, quoted
from nanovlm.evaluation.metrics import CJK
from nanovlm.inputs import data_uri
from nanovlm.inputs.chat import IMAGE, Message

MAX_FIELD = 2**26  # characters of a field: an image in base64
MAX_NAME = 64  # characters of a row's index; VLMEvalKit tells it from an image so
LETTERS = string.ascii_uppercase
# What asks for a letter alone: the format prompt of LLaVA-1.5 (Liu et al. 2023), which MMStar's
# own evaluation uses in both languages.
ONLY_THE_LETTER = "Answer with the option's letter from the given choices directly."
ONLY_THE_LETTER_ZH = "请直接回答选项字母。"


@dataclass(frozen=True)
class Question:
    """One question as it is asked, with the answers to choose from."""

    record: Record  # its choices are in `extra`, the right one is its only reference
    options: tuple[str, ...] = ()  # what each choice stands for; () where they are only in the text
    unit: str = ""  # what is scored as one: the rotations of a question, else the question
    cluster: str = ""  # what the bootstrap draws together
    parts: Mapping[str, str] = field(default_factory=dict)  # such as {"category": "ocr"}

    @property
    def choices(self) -> tuple[str, ...]:
        """The answers to choose from."""
        return self.record.extra["choices"]

    @property
    def right(self) -> int:
        """The place of the right one among them."""
        return self.choices.index(self.record.references[0])


def make_record(where: str, image: Path, text: str, choices: Sequence[str], answer: str) -> Record:
    """The record of a question about an image."""
    asked = (Message("user", (IMAGE, "\n" + text)),)
    return Record(where, (image,), asked, (answer,), {"choices": tuple(choices)})


def with_instruction(text: str) -> str:
    """A question of multiple choice, and that its answer is to be a letter."""
    return f"{text}\n{ONLY_THE_LETTER_ZH if CJK.search(text) else ONLY_THE_LETTER}"


def with_options(question: str, hint: str, options: Sequence[str]) -> str:
    """A question with its hint before it and its options after it, a line each."""
    listed = [f"{letter}. {option}" for letter, option in zip(LETTERS, options)]
    return with_instruction("\n".join([*([hint] if hint else []), question, *listed]))


def table_rows(path: Path, needed: Sequence[str], what: str) -> Iterator[tuple[str, Any]]:
    """The rows of a table with their places; the names of columns are in lower case.

    A row that is damaged is a NanoVLMError. Raises one for a file without the columns `needed`.
    """
    is_first = True
    for where, value, _ in rows(path, longest=MAX_FIELD):
        if isinstance(value, Mapping):
            value = {str(name).lower(): cell for name, cell in value.items()}
            missing = [name for name in needed if name not in value]
            if is_first and missing:
                raise NanoVLMError(
                    f"{path}: has no column {', '.join(missing)}, but {quoted(', '.join(value))}; "
                    f"{what}"
                )
            is_first = False
        elif not isinstance(value, NanoVLMError):
            value = NanoVLMError(f"is a JSON {type(value).__name__}, expected columns with names")
        yield where, value
    if is_first:
        raise NanoVLMError(f"{path}: holds no row that can be read; {what}")


def text_of(row: Mapping[str, Any], name: str) -> str:
    """A cell as text; "" where it is empty or not there."""
    value = row.get(name)
    return "" if value is None or value != value else str(value).strip()  # NaN is empty, too


def options_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The options in the columns A, B, … of a row, up to the first that is empty."""
    options = []
    for letter in LETTERS.lower():
        if not (option := text_of(row, letter)):
            break
        options.append(option)
    return tuple(options)


def image_of(row: Mapping[str, Any], known: Mapping[str, Path] = {}) -> Path:
    """The image in a row: base64, bytes, or the index of the row that has it (`known`)."""
    value = row.get("image")
    if isinstance(value, Mapping):
        value = value.get("bytes")
    if isinstance(value, bytes) and value:
        return data_uri.from_bytes(value)
    name = "" if value is None else str(value).strip()
    if not name:
        raise NanoVLMError("has no image")
    if len(name) <= MAX_NAME:
        if name not in known:
            raise NanoVLMError(f"names the image of row {quoted(name)}, which is not there")
        return known[name]
    try:
        return data_uri.to_path(name)
    except NanoVLMError as error:
        raise NanoVLMError(f"its image {error}") from None


def letters_in(text: str) -> tuple[str, ...]:
    """The letters of the options that a question lists itself: `A: …, B: …` or `(A) …`.

    They are A, B, … up to the first that is not listed, and A to D if none are.
    """
    listed = set(re.findall(r"(?<!\w)([A-Z])[:.)]", text))
    letters = LETTERS[: next(i for i, letter in enumerate(LETTERS + " ") if letter not in listed)]
    return tuple(letters if len(letters) > 1 else "ABCD")
