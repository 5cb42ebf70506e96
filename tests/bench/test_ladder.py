"""The ladder on tiny random weights: a rung changes speed and memory, and not the losses."""

from pathlib import Path

import pytest
import torch

from nanovlm.bench import ladder

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "IMAGE_SIZE": 70,
        "GRID": 2,
        "SAMPLES": 6,
        "TEXT_LENGTHS": (4, 24),
        "PACK": 64,
    }.items():
        monkeypatch.setattr(ladder, name, value)
    # In fp32, to be compared exactly.
    monkeypatch.setitem(ladder.RUNGS, "+ packing", ladder.Rung(packed=True))


def test_packing_fills_rows_and_gives_the_same_losses(weights: Path) -> None:
    figures = {
        name: ladder.measure(name, weights, CPU, rounds=2) for name in ("float32", "+ packing")
    }
    padded, packed = figures.values()
    for loss in ("first_loss", "last_loss"):
        assert packed[loss] == pytest.approx(padded[loss], abs=1e-5)
    assert padded["last_loss"] < padded["first_loss"]
    assert packed["fill"] > padded["fill"]
    header, *lines, _ = ladder.table(figures).splitlines()
    assert len(lines) == 2 and all(line.startswith(name) for name, line in zip(figures, lines))
    assert {len(line) for line in lines} == {len(header)}


def test_checkpointing_gives_the_same_losses(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        ladder.RUNGS, "+ checkpointing", ladder.Rung(packed=True, checkpointed=True)
    )
    plain, checkpointed = (
        ladder.measure(name, weights, CPU, rounds=1) for name in ("+ packing", "+ checkpointing")
    )
    assert checkpointed["last_loss"] == pytest.approx(plain["last_loss"], abs=1e-5)
