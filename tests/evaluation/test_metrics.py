"""The metrics: tokens by hand, scores against figures that `pycocoevalcap` 1.2 gave for the same
made-up corpus."""

import random
import time

import pytest

from nanovlm.errors import NanoVLMError
from nanovlm.evaluation.metrics import bleu, cider_d, exact_match, tokenize, wrong_objects

# pycocoevalcap 1.2, `Cider().compute_score` and `Bleu(4).compute_score` on `make_corpus(seed,
# photos)`. The package is not in requirements-dev.txt (100 MB of Java archives);
# `test_scores_equal_live_pycocoevalcap` runs where it is there.
FROZEN = {
    (0, 40): (1.35049035463, [0.779767766729, 0.66365416231, 0.569846569999, 0.513677503831]),
    (1, 7): (1.21016757717, [0.533575901552, 0.456427865957, 0.341922107983, 0.284295362472]),
    (2, 1): (0, [0.0909090909008, 3.01511344549e-09, 1.00335572975e-11, 5.96099427263e-13]),
}


def make_corpus(seed: int, photos: int) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Answers and one to five references a photo, of 0 to 14 words that get rarer along the
    alphabet."""
    rng = random.Random(seed)

    def sentence() -> list[str]:
        return [
            chr(ord("a") + min(int(rng.expovariate(0.4)), 25)) for _ in range(rng.randrange(15))
        ]

    references = [[sentence() for _ in range(rng.randint(1, 5))] for _ in range(photos)]
    # Half of the answers repeat a reference with one word dropped, so that long n-grams match too.
    answers = [group[0][1:] if rng.random() < 0.5 else sentence() for group in references]
    return answers, references


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("两只狗，在草地上。", list("两只狗在草地上")),
        ("穿Ｔ恤的 2 号", ["穿", "t", "恤", "的", "2", "号"]),
        ("A man's t-shirt , dirty .", ["a", "man's", "t-shirt", "dirty"]),
        ("the man’s 'quoted' dog--barks", ["the", "man's", "quoted", "dog", "barks"]),
        ("。！ …", []),
        ("", []),
        ("café 3", ["café", "3"]),
        ("犬𠀀かな", ["犬", "𠀀", "か", "な"]),
    ],
)
def test_tokenize(text: str, tokens: list[str]) -> None:
    assert tokenize(text) == tokens


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("有。", "有"),
        (" Yes. ", "yes"),
        ("２个", "2个"),
        ("红色，圆形", "红色,圆形。"),
        ("a  red\ncircle .", "A red circle."),
    ],
)
def test_exact_match_forgives_form(answer: str, reference: str) -> None:
    assert exact_match(answer, ["something else", reference])


@pytest.mark.parametrize(
    ("answer", "reference"),
    [("没有", "有"), ("", "有"), ("红色", "红"), ("redcircle", "red circle"), ("12", "1,2")],
)
def test_exact_match_does_not_forgive_content(answer: str, reference: str) -> None:
    assert not exact_match(answer, [reference])


@pytest.mark.parametrize("corpus", FROZEN)
def test_scores_equal_frozen_pycocoevalcap(corpus: tuple[int, int]) -> None:
    answers, references = make_corpus(*corpus)
    expected_cider, expected_bleu = FROZEN[corpus]
    assert cider_d(answers, references) == pytest.approx(expected_cider, abs=1e-9)
    assert [bleu(answers, references, n) for n in (1, 2, 3, 4)] == pytest.approx(
        expected_bleu, abs=1e-9
    )


def test_scores_equal_live_pycocoevalcap() -> None:
    cider = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    scorer = pytest.importorskip("pycocoevalcap.bleu.bleu").Bleu(4)
    for seed in range(50):
        answers, references = make_corpus(seed, photos=1 + seed % 9)
        given = {i: [" ".join(answer)] for i, answer in enumerate(answers)}
        expected = {i: [" ".join(tokens) for tokens in group] for i, group in enumerate(references)}
        assert cider_d(answers, references) == pytest.approx(
            cider.compute_score(expected, given)[0], abs=1e-9
        )
        bleus = scorer.compute_score(expected, given, verbose=0)[0]
        assert [bleu(answers, references, n) for n in (1, 2, 3, 4)] == pytest.approx(
            bleus, abs=1e-9
        )


def test_perfect_answers_score_highest() -> None:
    references = [[list("abcde")], [list("fghij")], [list("klmno")]]
    answers = [group[0] for group in references]
    assert cider_d(answers, references) == pytest.approx(10.0)
    assert bleu(answers, references) == pytest.approx(1.0)
    shuffled = answers[1:] + answers[:1]
    assert cider_d(shuffled, references) == 0.0
    assert bleu(shuffled, references) < 1e-9


def test_repeating_a_rare_word_does_not_pay() -> None:
    references = [[list("abcd")], [list("efgh")]]
    once, often = ([list("abcd"), list(text)] for text in ("efgh", "efghhhhhh"))
    assert cider_d(often, references) < cider_d(once, references)


def test_a_thousand_photos_take_about_a_second() -> None:
    answers, references = make_corpus(3, photos=1000)
    start = time.perf_counter()
    cider_d(answers, references)
    bleu(answers, references)
    assert time.perf_counter() - start < 5  # 0.3 s on an idle core


@pytest.mark.parametrize("score", [cider_d, bleu])
def test_missing_references_are_named(score) -> None:
    with pytest.raises(NanoVLMError, match="question 1 has no reference"):
        score([["a"], ["b"]], [[["a"]], []])
    with pytest.raises(NanoVLMError, match="2 answers for 1 questions"):
        score([["a"], ["b"]], [[["a"]]])
    with pytest.raises(NanoVLMError, match="0 answers"):
        score([], [])


@pytest.mark.parametrize(
    ("answers", "chair_i", "chair_s"),
    [
        (["图中有两个物体，从左到右是：大的红色圆形、小的蓝色圆环。"], 0.0, 0.0),
        (
            ["图中有两个物体，从左到右是：小的蓝色圆环、大的红色圆形"],
            0.0,
            0.0,
        ),  # order does not count
        (["图中有一个物体：大的红色圆形。"], 0.0, 0.0),  # leaving one out names nothing wrong
        (["图中有两个物体，从左到右是：大的红色圆形、小的蓝色心形。"], 0.5, 1.0),
        (
            ["图中有两个物体，从左到右是：大的红色圆形、大的红色圆形。"],
            0.5,
            1.0,
        ),  # said twice, there once
        (
            ["There are two objects, from left to right: a big red circle, a small blue ring."],
            1.0,
            1.0,
        ),  # another language
        (["有。"], 0.0, 0.0),
        ([""], 0.0, 0.0),  # no object is named
    ],
)
def test_wrong_objects_by_hand(answers, chair_i, chair_s):
    references = [["图中有两个物体，从左到右是：大的红色圆形、小的蓝色圆环。"]]
    assert wrong_objects(answers, references) == {"chair_i": chair_i, "chair_s": chair_s}


def test_wrong_objects_over_several_descriptions_and_references():
    answers = [
        "There is one object: a big red circle.",
        "There are three objects: a big red circle, a small star, a ring.",
        "：大的圆",
    ]
    references = [
        ["There is one object: a small red circle.", "There is one object: a big red circle."],
        ["There are two objects, from left to right: a ring, a small star."],
        ["：大的圆、小的圆"],
    ]
    assert wrong_objects(answers, references) == {
        "chair_i": pytest.approx(1 / 5),
        "chair_s": pytest.approx(1 / 3),
    }
