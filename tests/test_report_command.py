"""python -m nanovlm.report: the tables, also of damaged runs, and no file is overwritten."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nanovlm import report
from nanovlm.errors import NanoVLMError
from nanovlm.training.settings import Settings, to_toml


def make_run(folder: Path, steps: int = 10, settings: dict | None = None, **extra) -> Path:
    """A synthetic run: losses 1/step, validations every other step, 4 samples a step, 2 steps/s."""
    folder.mkdir(parents=True)
    (folder / "settings.toml").write_text(
        to_toml(Settings(**{"out": str(folder), **(settings or {})}))
    )
    lines = [
        {
            "step": step,
            "loss": 1 / step,
            "lr": 1e-3,
            "grad_norm": None,
            "samples": 4 * step,
            "tokens": 400 * step,
            "tokens_per_second": 800.0,
            "seconds": step / 2,
            **extra,
            **({"val_loss": abs(step - 8) + 1.0} if step % 2 == 0 else {}),
        }
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    """Run the command on folders; returns the tables as lists of rows of cells, and stderr."""

    def start(*runs: Path, out: Path = tmp_path / "report.png"):
        monkeypatch.setattr(sys, "argv", ["report", *map(str, runs), "--out", str(out)])
        report.main()
        printed = capsys.readouterr()
        tables = [
            [line.strip("| ").split(" | ") for line in block.splitlines()]
            for block in printed.out.split("\n\n")
            if block.startswith("|")
        ]
        return tables, printed.err

    return start


def test_the_table_tells_what_a_run_was_and_how_it_ended(tmp_path, compare):
    first = make_run(
        tmp_path / "first",
        settings={"train": "projector,language_model", "language_model_layers": 2, "lr": 0.01},
    )
    second = make_run(
        tmp_path / "second",
        steps=1200,
        settings={"train": "projector,language_model", "lora_rank": 8},
        peak_memory_gb=7.5,
        data_wait=0.25,
    )
    (runs, settings), err = compare(first, second)
    header, rule, *rows = runs
    first, second = (dict(zip(header, row, strict=True)) for row in rows)
    assert set("".join(rule)) == {"-"}
    assert first == {
        "run": "first",
        "trained": "projector, language_model (top 2)",
        "steps": "10",
        "samples": "40",
        "tokens": "4,000",
        "minutes": "0.1",
        "samples/s": "8.0",
        "best val loss": "1.0000 at step 8",
        "peak memory, GB": "–",
        "loss, last 5 lines": f"{sum(1 / n for n in range(6, 11)) / 5:.4f}",
        "waiting for data": "–",
    }
    assert second["trained"] == "projector, language_model (LoRA rank 8)"
    assert second["steps"] == "1,200" and second["minutes"] == "10.0"
    assert second["peak memory, GB"] == "7.50" and second["waiting for data"] == "25.0%"
    assert settings == [
        ["setting", "first", "second"],
        ["---"] * 3,
        ["language_model_layers", "2", "0"],
        ["lora_rank", "0", "8"],
        ["lr", "0.01", "0.001"],
    ]
    assert err == f"the curves are in {tmp_path / 'report.png'}\n"
    with Image.open(tmp_path / "report.png") as figure:
        assert figure.format == "PNG" and figure.width > 1000
        assert {(31, 119, 180), (255, 127, 14)} <= {
            colour for _, colour in figure.convert("RGB").getcolors(1 << 20)
        }


def test_one_run_has_nothing_to_differ_from_and_what_was_not_logged_has_no_column(
    tmp_path, compare
):
    (table,), _ = compare(make_run(tmp_path / "only"))
    assert "peak memory, GB" not in table[0] and "waiting for data" not in table[0]


def test_runs_of_the_same_name_go_by_their_paths(tmp_path, compare):
    paths = [make_run(tmp_path / parent / "run") for parent in "ab"]
    (table,), _ = compare(*paths)
    assert [row[0] for row in table[2:]] == [str(path) for path in paths]


def test_damaged_lines_are_named_and_left_out(tmp_path, compare):
    run = make_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[2:6] = ['{"step": 3, "lo', "[1]", '{"step": 5, "loss": NaN, "val_loss": "?"}', "torn"]
    (run / "metrics.jsonl").write_text(
        "\n".join(lines) + '\n{"step": 11, "loss"'
    )  # the last one is being written
    (table,), err = compare(run)
    assert (
        f"{run / 'metrics.jsonl'}: not a line of metrics, skipped: line 3, 4, 6\n" in err
        and err.count("\n") == 2
    )
    assert dict(zip(table[0], table[2]))["steps"] == "10"


def test_a_run_that_has_only_begun_and_one_without_settings_are_compared_as_far_as_they_are(
    tmp_path, compare
):
    begun, bare, whole = (
        make_run(tmp_path / "begun", 0),
        make_run(tmp_path / "bare"),
        make_run(tmp_path / "whole"),
    )
    (bare / "settings.toml").write_text("lr = [")
    (table,), err = compare(begun, bare, whole)
    assert [row[:3] for row in table[2:]] == [
        ["begun", "projector", "–"],
        ["bare", "–", "10"],
        ["whole", "projector", "10"],
    ]
    assert (
        f"{begun / 'metrics.jsonl'}: holds no line yet" in err
        and f"{bare / 'settings.toml'}: is not valid TOML" in err
    )
    (tmp_path / "report.png").unlink()
    (table,), _ = compare(begun)
    assert len(table) == 3


def test_a_folder_without_a_run_is_one_line_and_exit_2(tmp_path, call):
    refused = call(report.main, tmp_path)
    assert refused.returncode == 2 and refused.stdout == ""
    assert (
        refused.stderr.startswith(f"error: {tmp_path}: holds no run")
        and refused.stderr.count("\n") == 1
    )
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path, compare):
    run = make_run(tmp_path / "run")
    compare(run)
    Image.new("RGB", (2, 2)).save(run / "curves.png")
    paths = [tmp_path / "report.png", *sorted(run.iterdir())]
    before = [path.read_bytes() for path in paths]
    for out in (*paths, run, run / "model"):
        with pytest.raises(NanoVLMError, match="already|this command reads|read by this command"):
            compare(run, out=out)
    assert [path.read_bytes() for path in paths] == before
    with pytest.raises(NanoVLMError, match="is not a folder; make it"):
        compare(run, out=tmp_path / "nowhere" / "report.png")


def test_smoothing_keeps_a_constant_and_the_length():
    assert np.allclose(report.smooth([2.0] * 200), 2.0)
    noisy = np.random.default_rng(0).normal(size=500)
    assert (
        len(report.smooth(list(noisy))) == 500
        and report.smooth(list(noisy)).std() < 0.5 * noisy.std()
    )
    assert len(report.smooth([])) == 0 and report.smooth([3.0]) == [3.0]
