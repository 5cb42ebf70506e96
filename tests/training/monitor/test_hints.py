"""Hints: said once, when a run learns nothing, and about no other."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from nanovlm.errors import see
from nanovlm.training.monitor.hints import NO_BETTER, PATIENCE, Hints
from nanovlm.training.settings import Settings

SETTINGS = Settings(warmup=0.1)
GUESS = math.log(1000)


def hints(settings: Settings = SETTINGS) -> Hints:
    return Hints(settings, vocab_size=1000, total_steps=500)  # 50 of them are the warm-up


def lines(*answers: str, references: Sequence[str] = "abcdef") -> list[dict]:
    return [
        {"step": 7, "answer": answer, "reference": reference}
        for answer, reference in zip(answers, references)
    ]


def test_a_loss_that_stays_that_of_a_guess_is_named_once_after_the_warm_up(capsys):
    shown = hints()
    shown.look_at_loss(50 + PATIENCE - 1, GUESS)
    assert capsys.readouterr().err == ""
    shown.look_at_loss(50 + PATIENCE, GUESS)
    shown.look_at_loss(50 + PATIENCE + 10, GUESS)
    assert capsys.readouterr().err == (
        f"step {50 + PATIENCE}: the loss is 6.91, and a guess among all tokens has 6.91 (ln V); "
        f"{see('loss-near-ln-v')}\n"
    )


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        (SETTINGS, 0.99 * NO_BETTER * GUESS),
        (SETTINGS, None),  # no step since the last line was finite
        (replace(SETTINGS, objective="dpo"), GUESS),  # is no mean over tokens
        (replace(SETTINGS, tiny=True), GUESS),  # random weights, most of them frozen
    ],
)
def test_other_losses_are_not_named(settings, loss, capsys):
    hints(settings).look_at_loss(400, loss)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("answer", "called"), [("a man", "the same answer"), ("", "an empty answer")]
)
def test_one_answer_to_all_watched_questions_is_named_once(answer, called, capsys):
    shown = hints()
    shown.look_at_answers(lines(answer, f"{answer} ", answer))
    shown.look_at_answers(lines(answer, answer, answer))
    assert capsys.readouterr().err == (
        f"step 7: all 3 watched questions got {called}; {see('same-answers')}\n"
    )


@pytest.mark.parametrize(
    ("settings", "answered"),
    [
        (SETTINGS, []),
        (SETTINGS, lines("a", "a")),  # too few to tell
        (SETTINGS, lines("a", "a", "b")),
        (SETTINGS, lines("yes", "yes", "yes", references=["yes", "yes", "yes"])),
        (replace(SETTINGS, tiny=True), lines("a", "a", "a")),
    ],
)
def test_other_answers_are_not_named(settings, answered, capsys):
    hints(settings).look_at_answers(answered)
    assert capsys.readouterr().err == ""
