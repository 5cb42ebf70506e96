"""Inputs of every kind that a fuzzer makes are read or refused, and nothing is lost.

By default a few with fixed seeds. `pytest tests/fuzz -m slow` takes 10,000, from the seed in the
variable FUZZ_SEED or, without it, from today's date, and prints what became of them.
"""

import os
import time

import pytest

from tests.fuzz.kinds import KINDS
from tests.fuzz.run import fuzz, table


@pytest.mark.parametrize("name", KINDS)
def test_inputs_are_read_or_refused(name: str):
    counts = fuzz(KINDS[name], seed=0, count=KINDS[name].short)
    assert not counts.failures, counts.report()


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_many_inputs_are_read_or_refused(name: str, capsys):
    seed = int(os.environ.get("FUZZ_SEED") or time.strftime("%Y%m%d"))
    counts = fuzz(KINDS[name], seed, KINDS[name].long)
    with capsys.disabled():
        print(f"\nseed {seed}\n{table([counts])}")
    assert not counts.failures, counts.report()
