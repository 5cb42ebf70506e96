"""`check` tells how far an exercise's answer is from the right one, and never stops a notebook."""

from typing import Any

import torch
from torch import Tensor


def check(exercise: str, answer: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Print whether `answer` is exact, close (with the largest difference) or not there yet.

    `answer` and `expected` are tensors, numbers, or anything that can be compared with `==`.
    `answer` is None or `...` while the exercise is open.
    """
    try:
        verdict = _verdict(answer, expected, tolerance)
    except Exception as error:  # a lesson goes on whatever the answer is
        verdict = f"not yet ({type(error).__name__}: {error})"
    print(f"{exercise}  {verdict}")


def _verdict(answer: Any, expected: Any, tolerance: float) -> str:
    if answer is None or answer is ...:
        return "not yet (no answer)"
    if not isinstance(expected, Tensor | int | float) or isinstance(expected, bool):
        return "exact" if answer == expected else f"not yet (got {_short(answer)})"
    right = torch.as_tensor(expected)
    got = torch.as_tensor(answer)
    if got.shape != right.shape:
        return f"not yet (expected shape {tuple(right.shape)}, got {tuple(got.shape)})"
    if got.dtype == right.dtype and torch.equal(got, right):
        return "exact"
    difference = (got.double() - right.double()).abs().max().item()
    if difference == 0:
        return "exact"
    scale = max(1.0, right.double().abs().max().item())
    word = "close" if difference <= tolerance * scale else "not yet"
    return f"{word} (largest difference {difference:.1e})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
