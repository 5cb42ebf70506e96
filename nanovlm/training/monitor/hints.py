"""Signs that a run learns nothing, each named once, with where to read what to do about it."""

import math
from collections.abc import Sequence
from typing import Any

from nanovlm.errors import see
from nanovlm.training.settings import Settings
from nanovlm.utils.console import say

PATIENCE = 100  # steps after the warm-up
NO_BETTER = 0.95  # of the loss of a guess
FEWEST = 3  # answers that are compared


class Hints:
    """Looks at what a run logs anyway: the loss of a line, and the answers of a validation.

    Quiet at toy widths, whose weights are random on purpose.
    """

    def __init__(self, settings: Settings, vocab_size: int, total_steps: int) -> None:
        self._guess = math.log(vocab_size)  # the loss where all tokens are equally likely
        self._first = settings.warmup * total_steps + PATIENCE
        self._loss_due = settings.objective == "sft" and not settings.tiny
        self._answers_due = not settings.tiny

    def look_at_loss(self, step: int, loss: float | None) -> None:
        """Say so if the loss of this line is still that of a guess among all tokens."""
        if not self._loss_due or loss is None or step < self._first:
            return
        if loss > NO_BETTER * self._guess:
            self._loss_due = False
            say(
                f"step {step}: the loss is {loss:.2f}, and a guess among all tokens has "
                f"{self._guess:.2f} (ln V); {see('loss-near-ln-v')}"
            )

    def look_at_answers(self, lines: Sequence[dict[str, Any]]) -> None:
        """Say so if the watched questions got one answer and have several references.

        lines: those of samples.jsonl after one step.
        """
        answers, references = (
            {line[key].strip() for line in lines} for key in ("answer", "reference")
        )
        if not self._answers_due or len(lines) < FEWEST or len(answers) > 1 or len(references) < 2:
            return
        self._answers_due = False
        answer = "an empty answer" if answers == {""} else "the same answer"
        say(
            f"step {lines[0]['step']}: all {len(lines)} watched questions got {answer}; "
            f"{see('same-answers')}"
        )
