"""MMBench, English and Chinese (Liu et al. 2023): multiple choice with circular evaluation.

Read are the published tables: of github.com/open-compass/MMBench (`mmbench_dev_en_20231003.tsv`)
and of VLMEvalKit (`MMBench_DEV_EN.tsv`, `…CN`, `…V11`), with tabs between `index`, `question`,
`hint`, `A` to `D`, `answer`, `category`, `l2-category`, `split` and `image`, in base64 or, to save
space, the index of the row that has it; parquet tables of these columns are read as well.

A question with N options is asked N times, with its options rotated; it counts as right if all N
answers are. VLMEvalKit's tables hold the rotations as rows of their own, whose index is the
question's plus a multiple of a million (or names it in `g_index`); otherwise they are made here.
An answer is read as VLMEvalKit does before any language model is asked to judge
(`vlmeval/utils/matching_util.py`, "exact_matching" in `vlmeval/dataset/utils/multiple_choice.py`,
as of August 2026).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanovlm.data.records import record_files
from nanovlm.errors import NanoVLMError, quoted
from nanovlm.evaluation.benchmarks.questions import (
    LETTERS,
    MAX_NAME,
    Question,
    image_of,
    make_record,
    options_of,
    table_rows,
    text_of,
    with_options,
)
from nanovlm.utils.console import say

ROTATION = 1_000_000  # between the indices of a question's rotations
METRICS = ("accuracy",)
KINDS = ("l2-category", "category")
NEEDED = ("index", "question", "image", "a", "b")
WHAT = (
    "the tables of MMBench have the columns index, question, hint, A, B, C, D, answer, category "
    "and image, such as MMBench_DEV_EN.tsv"
)
# Answers that VLMEvalKit takes for a refusal, whatever letters they hold.
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


class Row(NamedTuple):
    """A row of the table."""

    where: str
    index: str
    unit: str  # the index of the question of which it is a rotation
    cells: Mapping[str, Any]
    image: Path | str  # or the index of the row that has it


def read(data: str, images: Path | None, limit: int = 0) -> tuple[list[Question], list[str]]:
    """The questions of one table, rotated, and a line for each row that is skipped.

    A question is left out with all its rotations if one of them cannot be asked. limit: questions.
    """
    path = one_file(data)
    rows, skipped, broken = _readable(path)
    known = {row.index: row.image for row in rows if isinstance(row.image, Path)}
    has_rotations = any(row.unit != row.index for row in rows)
    units: dict[str, list[Question]] = {}
    for row in rows:
        if limit and len(units) == limit and row.unit not in units:
            continue
        try:
            image = (
                row.image if isinstance(row.image, Path) else image_of({"image": row.image}, known)
            )
            asked = _rotations(row, image, 1 if has_rotations else None)
            units.setdefault(row.unit, []).extend(asked)
        except NanoVLMError as error:
            skipped.append(f"{row.where}: {error}")
            broken.add(row.unit)
    whole = {unit: asked for unit, asked in units.items() if unit not in broken}
    short = [unit for unit, asked in whole.items() if len(asked) < len(asked[0].choices)]
    if short:
        say(
            f"{path}: {len(short)} of {len(whole)} questions have fewer rotations than options, "
            f"such as index {short[0]}; they are asked as often as they stand there"
        )
    return [question for asked in whole.values() for question in asked], skipped


def one_file(data: str) -> Path:
    """The only file that `data` names."""
    paths = record_files(data)
    if len(paths) != 1:
        raise NanoVLMError(f"{data}: {len(paths)} files; this benchmark is scored on one at a time")
    return paths[0]


def _readable(path: Path) -> tuple[list[Row], list[str], set[str]]:
    """The rows that can be used, a line for each other one, and the questions these belong to."""
    rows, skipped, broken, without_answer = [], [], set(), 0
    places: dict[str, str] = {}  # of indices
    for where, cells in table_rows(path, NEEDED, WHAT):
        unit = ""
        try:
            if isinstance(cells, NanoVLMError):
                raise cells
            index = _whole_number(cells, "index")
            named = text_of(cells, "g_index")
            unit = _whole_number(cells, "g_index") if named else str(int(index) % ROTATION)
            if places.setdefault(index, where) != where:
                raise NanoVLMError(f"its index is {index}, that of {places[index]}")
            if not text_of(cells, "answer"):
                without_answer += 1
                raise NanoVLMError("has no answer")
            image = text_of(cells, "image") if isinstance(cells["image"], str) else ""
            image = image if 0 < len(image) <= MAX_NAME else image_of(cells)
            rest = {name: value for name, value in cells.items() if name != "image"}
            rows.append(Row(where, index, unit, rest, image))
        except NanoVLMError as error:
            skipped.append(f"{where}: {error}")
            broken.add(unit)
    if without_answer and not rows:
        raise NanoVLMError(
            f"{path}: none of its {without_answer} questions has an answer; those of the test "
            "split are not published, take the dev split"
        )
    return rows, skipped, broken


def _whole_number(cells: Mapping[str, Any], name: str) -> str:
    """An index, which may have passed through a table of floats."""
    text = text_of(cells, name)
    if not re.fullmatch(r"\d{1,12}(\.0)?", text):
        raise NanoVLMError(f"its {name} is {quoted(text)}, expected a whole number")
    return text.removesuffix(".0")


def _rotations(row: Row, image: Path, number: int | None) -> list[Question]:
    """The question of a row with its options rotated, `number` of these or all."""
    options, letter = options_of(row.cells), text_of(row.cells, "answer")
    choices = LETTERS[: len(options)]
    if len(options) < 2 or len(letter) != 1 or letter not in choices:
        raise NanoVLMError(
            f"its answer is {quoted(letter)}, and its options are {choices or 'none'}"
        )
    question, hint = text_of(row.cells, "question"), text_of(row.cells, "hint")
    parts = {kind: value for kind in KINDS if (value := text_of(row.cells, kind))}
    asked = []
    for shift in range(number or len(options)):
        rotated = options[shift:] + options[:shift]
        right = choices[(choices.index(letter) - shift) % len(options)]
        text = with_options(question, hint, rotated)
        record = make_record(row.where, image, text, choices, right)
        asked.append(Question(record, rotated, row.unit, row.unit, parts))
    return asked


def parse(question: Question, answer: str) -> int | None:
    """The option that an answer chooses, or None where it cannot be told.

    It is the only option's letter that stands in the answer as a word, among the last four; or what
    follows "answer is"; or the only option whose text is in the answer, unless that is longer than
    twice all options together.
    """
    if any(refusal in answer for refusal in REFUSALS):
        return None
    words = answer.translate(PUNCTUATION).split()
    named = [letter for letter in question.choices if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return question.choices.index(named[0])
    if not named and "Z" in words:  # the letter of "none of them"
        return None
    stated = re.search(r"answer\s+is\s+\**([abcd])", answer, re.IGNORECASE)
    if stated and stated[1].upper() in question.choices:
        return question.choices.index(stated[1].upper())
    if len(answer) > 2 * sum(map(len, question.options)):
        return None
    texts = [option.lower() in answer.lower() for option in question.options]
    return texts.index(True) if sum(texts) == 1 else None


def count(unit: list[Question], chosen: list[int | None]) -> list[int]:
    """[1 if all rotations of a question are answered right, 1]."""
    return [all(each.right == says for each, says in zip(unit, chosen)), 1]


def statistic(sums: np.ndarray) -> np.ndarray:
    """Counts, (…, 2) → the accuracy, (…, 1)."""
    return sums[..., :1] / sums[..., 1:]
