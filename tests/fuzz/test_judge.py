"""The judge and the search for the smallest input, with readers that are wrong on purpose."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nanovlm.errors import NanoVLMError
from tests.fuzz import judge as judging
from tests.fuzz.inputs import Input, Kind, Special
from tests.fuzz.judge import judge
from tests.fuzz.run import fuzz, table

SMALL = Input({"a": b"a"})


def kind(read: Callable[[Input], object], make=lambda rng: SMALL) -> Kind:
    return Kind("toy", make, lambda input: print(read(input)), short=1, long=1)


def refuse(_: Input) -> None:
    raise NanoVLMError("a: is no number; write one")


def refuse_in_two_lines(_: Input) -> None:
    raise NanoVLMError("a: is no number", "write one")


def refuse_with_details(_: Input) -> None:
    raise NanoVLMError("a: is no number:", "  write one")


def say_error(_: Input) -> None:
    print("error: but it goes on", file=sys.stderr)


def leave_something(_: Input) -> None:
    Path("b").write_bytes(b"")
    refuse(SMALL)


def test_what_is_read_or_refused_is_right():
    assert judge(kind(lambda _: Path("a").read_bytes()), SMALL).outcome == "read"
    assert judge(kind(refuse), SMALL).outcome == "refused"
    assert judge(kind(refuse_with_details), SMALL).outcome == "refused"
    assert judge(kind(lambda _: Path("b").write_bytes(b"b")), SMALL).outcome == "read"


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (lambda _: int("a"), "ValueError in the fuzzer"),
        (lambda _: bytearray(2**33), "more memory than it may take"),
        (lambda _: sys.exit(1), "exit code 1"),
        (say_error, "exit code 0 and 1 lines that begin with error"),
        (refuse_in_two_lines, "the error is not one line, with details indented below it"),
        (lambda _: Path("a").write_bytes(b"b"), "changed a"),
        (lambda _: Path("a").unlink(), "changed a"),
        (leave_something, "refused, and left b"),
    ],
)
def test_what_is_wrong_has_its_reason(read, reason):
    verdict = judge(kind(read), SMALL)
    assert (verdict.outcome, verdict.reason) == ("failed", reason)


def test_a_hang_ends(monkeypatch):
    monkeypatch.setattr(judging, "SECONDS", 0.1)
    pipe = Input({"a": Special.PIPE})
    assert judge(kind(lambda _: Path("a").read_bytes()), pipe).reason == "HangError in the fuzzer"


def test_a_failure_is_made_small_and_can_be_repeated():
    def make(rng):
        return Input({"a": rng.randbytes(99) + b"!" + rng.randbytes(99), "b": b""}, ("c", "d"))

    def read(_: Input) -> None:
        assert b"!" not in Path("a").read_bytes()

    counts = fuzz(kind(read, make), seed=5, count=3)
    assert counts.outcomes == {"read": 0, "refused": 0, "failed": 3}
    (failure,) = counts.failures.values()
    assert failure.input == Input({"a": b"!"}) and (failure.seed, failure.others) == (5, 2)
    assert "--kind toy --seed 5 --count 1" in counts.report() and "a: b'!'" in counts.report()
    assert table([counts]).split()[-5:-1] == ["3", "0", "0", "3"]
