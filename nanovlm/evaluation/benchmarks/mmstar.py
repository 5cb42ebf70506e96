"""MMStar (Chen et al. 2024): 1,500 questions of multiple choice that cannot do without the image.

Read are the published tables of huggingface.co/datasets/Lin-Chen/MMStar, `mmstar.parquet` (needs
pyarrow) and `MMStar.tsv`: `index`, `question`, `answer`, `category`, `l2_category` and `image`.
The options stand in the question (`Options: A: …, B: …` or `(A) …`), or in columns `A` to `D`. The
accuracy, and how an answer is read, are those of `eval/vlmeval/evaluate/mmstar.py` in
github.com/MMStar-Benchmark/MMStar; over all 1,500 questions the means are the published ones.

MMStar's own gain from the image and leakage (MG, ML) need answers without any image and of the
language model before it saw images. `image_minus_blind` is the former with a blank image.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanovlm.errors import NanoVLMError, quoted
from nanovlm.evaluation.benchmarks.mmbench import METRICS, count, one_file, statistic
from nanovlm.evaluation.benchmarks.questions import (
    LETTERS,
    Question,
    image_of,
    letters_in,
    make_record,
    options_of,
    table_rows,
    text_of,
    with_instruction,
    with_options,
)

__all__ = ["METRICS", "count", "parse", "read", "statistic"]

NEEDED = ("index", "question", "answer", "category", "l2_category", "image")
WHAT = (
    "the tables of MMStar have the columns index, question, image, answer, category and "
    "l2_category, such as mmstar.parquet"
)
BEFORE_THE_LETTER = ("", "(", "option ", "the answer is ")


def read(data: str, images: Path | None, limit: int = 0) -> tuple[list[Question], list[str]]:
    """The questions of one table, and a line for each row that is skipped."""
    questions, skipped = [], []
    for where, row in table_rows(one_file(data), NEEDED, WHAT):
        if limit and len(questions) + len(skipped) == limit:
            break
        try:
            if isinstance(row, NanoVLMError):
                raise row
            questions.append(_question(row, where))
        except NanoVLMError as error:
            skipped.append(f"{where}: {error}")
    return questions, skipped


def _question(row: Mapping[str, Any], where: str) -> Question:
    text, options = text_of(row, "question"), options_of(row)
    letters = tuple(LETTERS[: len(options)]) if len(options) > 1 else letters_in(text)
    answer = text_of(row, "answer").upper()
    if answer not in letters:
        raise NanoVLMError(f"its answer is {quoted(answer)}, and its options are {letters}")
    asked = with_options(text, "", options) if len(options) > 1 else with_instruction(text)
    record = make_record(where, image_of(row), asked, letters, answer)
    kinds = ("category", "l2_category")
    parts = {kind: value for kind in kinds if (value := text_of(row, kind))}
    return Question(record, options, where, where, parts)


def parse(question: Question, answer: str) -> int | None:
    """The option whose letter an answer begins with, alone or as in BEFORE_THE_LETTER.

    As published, whatever follows the letter does not matter: "a dog" chooses A.
    """
    answer = answer.lower().strip().replace("\n", " ")
    for before in BEFORE_THE_LETTER:
        letter = answer.removeprefix(before)[:1].upper()
        if answer.startswith(before) and letter in question.choices:
            return question.choices.index(letter)
    return None
