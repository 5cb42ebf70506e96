"""POPE: is an object in the image? Yes or no (Li et al. 2023, "Evaluating Object Hallucination …").

Read are the published files, `coco_pope_random.json`, `…popular.json` and `…adversarial.json` of
github.com/RUCAIBox/POPE (`output/coco/`): one JSON object a line with `image`, the name of a photo
of COCO's val2014, `text`, the question, and `label`, yes or no. Files of the same form about other
images are read, too. The scores, and how an answer is read, are those of its `evaluate.py`.
"""

import json
from pathlib import Path

import numpy as np

from nanovlm.data.records import image_path, read_entries, record_files
from nanovlm.errors import NanoVLMError, quoted
from nanovlm.evaluation.benchmarks.questions import Question, make_record

CHOICES = ("Yes", "No")
SPLITS = ("random", "popular", "adversarial")
METRICS = ("accuracy", "precision", "recall", "f1", "yes_ratio")
WHAT = (
    "the files of POPE hold one JSON object a line with image, text and label, such as "
    "coco_pope_random.json"
)


def read(data: str, images: Path | None, limit: int = 0) -> tuple[list[Question], list[str]]:
    """The questions of files of POPE, those of one image together, and a line for each skipped.

    images: the folder of the photos, by default that of each file. limit: questions of each file.
    """
    questions: list[Question] = []
    skipped: list[str] = []
    for path in record_files(data):
        folder = images or path.parent
        if not folder.is_dir():
            raise NanoVLMError(f"{folder}: is not a folder; say with --images where the images are")
        split = next((name for name in SPLITS if name in path.stem), path.stem)
        before, asked = len(questions) + len(skipped), len(questions)
        for where, entry in read_entries(path):
            if limit and len(questions) + len(skipped) - before == limit:
                break
            try:
                questions.append(_question(entry, where, folder, split))
            except NanoVLMError as error:
                skipped.append(f"{where}: {error}")
        if len(questions) + len(skipped) == before:
            raise NanoVLMError(f"{path}: holds no questions; {WHAT}")
        if len(questions) == asked and skipped[-1].endswith("does not exist"):
            raise NanoVLMError(f"{skipped[-1]}; say with --images where the images are")
    first = {}
    for number, question in enumerate(questions):
        first.setdefault(question.cluster, number)
    return sorted(questions, key=lambda question: first[question.cluster]), skipped


def _question(entry: object, where: str, folder: Path, split: str) -> Question:
    if isinstance(entry, NanoVLMError):
        raise entry
    if not isinstance(entry, dict) or not all(
        isinstance(entry.get(name), str) for name in ("image", "text", "label")
    ):
        raise NanoVLMError(f"is {quoted(json.dumps(entry, ensure_ascii=False))}; {WHAT}")
    label = entry["label"].strip().lower()
    if label not in ("yes", "no"):
        raise NanoVLMError(f"its label is {quoted(entry['label'])}, neither yes nor no")
    path = image_path(entry["image"], folder)
    record = make_record(where, path, entry["text"], CHOICES, CHOICES[label == "no"])
    return Question(record, (), where, str(path), {"split": split})


def parse(question: Question, answer: str) -> int:
    """No, if the first sentence of an answer has No, no or not as a word; yes, if it has none."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return int(any(word in words for word in ("No", "not", "no")))


def says_neither(answer: str) -> bool:
    """Whether an answer says neither yes nor no, and counts as yes nevertheless."""
    words = answer.lower().replace(".", " ").replace(",", " ").split()
    return not {"yes", "no", "not"} & set(words)


def count(unit: list[Question], chosen: list[int | None]) -> list[int]:
    """[true positives, false positives, true negatives, false negatives] of one question."""
    (question,), (says,) = unit, chosen
    is_yes, says_yes = question.right == 0, says == 0
    return [is_yes and says_yes, not is_yes and says_yes, not is_yes and not says_yes,
            is_yes and not says_yes]  # fmt: skip


def statistic(sums: np.ndarray) -> np.ndarray:
    """Counts, (…, 4) → METRICS, (…, 5); a ratio of nothing is 0."""
    true_yes, false_yes, true_no, false_no = np.moveaxis(np.asarray(sums, float), -1, 0)
    everything = true_yes + false_yes + true_no + false_no
    precision = _ratio(true_yes, true_yes + false_yes)
    recall = _ratio(true_yes, true_yes + false_no)
    f1 = _ratio(2 * precision * recall, precision + recall)
    accuracy = _ratio(true_yes + true_no, everything)
    yes_ratio = _ratio(true_yes + false_yes, everything)
    return np.stack([accuracy, precision, recall, f1, yes_ratio], axis=-1)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
