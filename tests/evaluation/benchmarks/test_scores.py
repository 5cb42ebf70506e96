"""Answers read and scored as published, by hand and by plain arithmetic; the bootstrap."""

import random
from pathlib import Path

import numpy as np
import pytest

from nanovlm.evaluation.benchmarks import bootstrap, mmbench, mmstar, pope
from nanovlm.evaluation.benchmarks.bootstrap import interval, resample
from nanovlm.evaluation.benchmarks.questions import Question, make_record
from nanovlm.evaluation.benchmarks.scores import score_benchmark, table

OPTIONS = ("a red cup", "a green hat", "one blue car", "the white sea")


def question(right: str, unit: str = "1", options=OPTIONS, **parts: str) -> Question:
    letters = "ABCD"[: len(options)]
    record = make_record("t.tsv:2", Path("a.jpg"), "?", letters, right)
    return Question(record, options, unit, unit, parts)


def yes_no(right: str, where: str, image: str, split: str = "random") -> Question:
    record = make_record(where, Path(image), "?", pope.CHOICES, right)
    return Question(record, (), where, image, {"split": split})


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"),
        ("(B).", "B"),
        ("C. one blue car", "C"),
        ("D: because it is so", None),  # the letter is the first of five words
        ("D: because it is", "D"),  # and here among the last four
        ("The answer is B, because it is green and round", "B"),
        ("the correct answer is **c**", "C"),
        ("answer is about", "A"),  # as published, a letter may open a word
        ("A or B", None),
        ("I see a green hat here", "B"),
        ("A GREEN HAT", "A"),  # a letter comes before the text of an option
        ("a red cup and a green hat", None),
        ("the white sea " + "x" * 90, None),  # longer than twice all options
        ("Z", None),
        ("Cannot determine the answer. A", None),
        ("", None),
        ("狗", None),
        ("E", None),
    ],
)
def test_how_mmbench_reads_an_answer(answer, letter):
    chosen = mmbench.parse(question("A"), answer)
    assert (None if chosen is None else "ABCD"[chosen]) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b: green", "B"),
        ("(c) it", "C"),
        ("Option D", "D"),
        ("The answer is a dog", "A"),
        ("a dog", "A"),  # as published, the first character counts
        ("dog", "D"),
        ("The correct answer is B", None),
        ("\n B\n", "B"),
        ("option\nc", "C"),
        ("[B]", None),
        ("", None),
        ("(", None),
    ],
)
def test_how_mmstar_reads_an_answer(answer, letter):
    chosen = mmstar.parse(question("A"), answer)
    assert (None if chosen is None else "ABCD"[chosen]) == letter


@pytest.mark.parametrize(
    ("answer", "says", "neither"),
    [
        ("Yes.", "Yes", False),
        ("No, there is none.", "No", False),
        ("there is not", "No", False),
        ("It may be. No.", "Yes", False),  # the first sentence counts
        ("NO", "Yes", False),  # as published, in these spellings alone
        ("Perhaps", "Yes", True),
        ("", "Yes", True),
        ("Nothing", "Yes", True),
    ],
)
def test_how_pope_reads_an_answer(answer, says, neither):
    asked = yes_no("Yes", "a", "a.jpg")
    assert pope.CHOICES[pope.parse(asked, answer)] == says
    assert pope.says_neither(answer) == neither


def test_pope_by_plain_arithmetic():
    """Against the definitions, written out over lists of labels, for each split and column."""
    rng = random.Random(0)
    questions = [
        yes_no(rng.choice(("Yes", "No")), f"{split}:{n}", f"{n // 6}.jpg", split)
        for split in pope.SPLITS
        for n in range(60)
    ]
    chosen = {name: [rng.randint(0, 1) for _ in questions] for name in ("image", "blind")}
    chosen["shuffled"] = [0] * len(questions)  # always yes
    scores = score_benchmark(pope, questions, chosen)
    for part in (None, *pope.SPLITS):
        told = scores if part is None else scores["parts"]["split"][part]
        for column, answers in chosen.items():
            pairs = [
                (each.record.references[0], pope.CHOICES[says])
                for each, says in zip(questions, answers)
                if part in (None, each.parts["split"])
            ]
            said = [right for right, says in pairs if says == "Yes"]
            there = [says for right, says in pairs if right == "Yes"]
            precision, recall = said.count("Yes") / len(said), there.count("Yes") / len(there)
            expected = {
                "accuracy": sum(right == says for right, says in pairs) / len(pairs),
                "precision": precision,
                "recall": recall,
                "f1": 2 * precision * recall / (precision + recall),
                "yes_ratio": len(said) / len(pairs),
            }
            assert told["n"] == len(pairs)
            for name, value in expected.items():
                assert told[column][name] == pytest.approx(value, abs=1e-6)
                low, high = told[column]["interval"][name]
                assert low <= told[column][name] <= high
            if column != "image":
                gain = told["image"]["accuracy"] - told[column]["accuracy"]
                assert told[f"image_minus_{column}"]["accuracy"] == pytest.approx(gain, abs=2e-6)
    assert scores["shuffled"]["recall"] == scores["shuffled"]["yes_ratio"] == 1
    assert scores["chance"] == 0.5


def test_a_model_that_never_says_yes_has_no_precision_and_no_error():
    questions = [yes_no("Yes", "1", "a.jpg"), yes_no("No", "2", "b.jpg")]
    chosen = {column: [1, 1] for column in ("image", "blind", "shuffled")}
    scores = score_benchmark(pope, questions, chosen)
    metrics = {name: scores["image"][name] for name in pope.METRICS}
    assert metrics == {"accuracy": 0.5, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}


def test_circular_evaluation_wants_all_rotations_right():
    questions = [
        *(question(letter, "1", category="ocr") for letter in "ABCD"),
        *(question(letter, "2", OPTIONS[:2], category="ocr") for letter in "AB"),
        *(question(letter, "3", OPTIONS[:3], category="count") for letter in "BCA"),
    ]
    right = [each.right for each in questions]
    one_wrong = [*right[:3], 0, *right[4:]]
    chosen = {"image": one_wrong, "blind": [0] * 9, "shuffled": [None] * 4 + right[4:]}
    scores = score_benchmark(mmbench, questions, chosen)
    assert scores["n"] == 3 and scores["image"]["accuracy"] == pytest.approx(2 / 3, abs=1e-6)
    assert scores["blind"]["accuracy"] == 0  # always A: a quarter of the rotations, no question
    assert scores["shuffled"]["accuracy"] == pytest.approx(2 / 3, abs=1e-6)
    parts = scores["parts"]["category"]
    assert (parts["ocr"]["n"], parts["ocr"]["image"]["accuracy"]) == (2, 0.5)
    assert (parts["count"]["n"], parts["count"]["image"]["accuracy"]) == (1, 1)
    assert scores["chance"] == pytest.approx((1 / 4**4 + 1 / 2**2 + 1 / 3**3) / 3, abs=1e-6)
    lines = table(scores, mmbench.METRICS)
    assert lines[1].split()[:3] == ["all", "3", "66.7"] and len({len(line) for line in lines}) == 1


def test_mmstar_is_the_share_of_right_answers():
    questions = [question("ABCD"[n % 4], str(n), category="math") for n in range(20)]
    chosen = {"image": [0] * 20, "blind": [None] * 20, "shuffled": [1] * 20}
    scores = score_benchmark(mmstar, questions, chosen)
    assert scores["image"]["accuracy"] == 0.25 == scores["chance"]
    assert scores["blind"]["accuracy"] == 0 and scores["blind"]["interval"]["accuracy"] == [0, 0]


def accuracy(sums):
    return sums[..., :1] / sums[..., 1:]


def test_the_interval_is_that_of_the_formula_for_a_share():
    """Of 400 answers, 90 % right: √(p(1 − p)/n) = 0.015, and 95 % lie within 1.96 of it."""
    counts = np.ones((1, 400, 2))
    counts[0, :40, 0] = 0
    draws = resample(counts, [str(n) for n in range(400)], accuracy)
    assert draws.shape == (bootstrap.TIMES, 1, 1)
    assert draws.mean() == pytest.approx(0.9, abs=0.002)
    assert draws.std() == pytest.approx(0.015, abs=0.001)
    low, high = interval(draws)[:, 0, 0]
    assert (low, high) == pytest.approx((0.9 - 1.96 * 0.015, 0.9 + 1.96 * 0.015), abs=0.004)
    again = resample(counts, [str(n) for n in range(400)], accuracy)
    assert np.array_equal(draws, again)  # the seed is fixed


def test_what_shares_an_image_is_drawn_together():
    """400 questions about 40 images, alike for each image, say as little as 40 questions."""
    counts = np.ones((1, 400, 2))
    counts[0, :40, 0] = 0
    draws = resample(counts, [str(n // 10) for n in range(400)], accuracy)
    assert draws.std() == pytest.approx((0.9 * 0.1 / 40) ** 0.5, rel=0.06)


def test_columns_are_drawn_in_pairs():
    """Two columns that differ in one question differ by at most a few in every draw."""
    counts = np.ones((2, 100, 2))
    counts[:, :50, 0] = 0
    counts[1, 0, 0] = 1
    draws = resample(counts, [str(n) for n in range(100)], accuracy)[..., 0]
    assert draws[:, 0].std() > 0.04 and (draws[:, 1] - draws[:, 0]).std() < 0.012
    assert (draws[:, 1] >= draws[:, 0]).all()
