"""The README's samples: columns from several runs, chosen questions, and one-line errors."""

import json
import shutil

import pytest
from PIL import Image

from data_tools import draw_samples


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Two short runs that validated after steps 2 and 4."""
    folder = tmp_path_factory.mktemp("runs")
    return [tiny.train(folder / name, val_every=2) for name in ("one", "two")]


@pytest.fixture
def drawn(monkeypatch):
    """What was given to `draw_answers`, which still draws."""
    calls, draw = [], draw_samples.draw_answers
    monkeypatch.setattr(
        draw_samples, "draw_answers", lambda *given: calls.append(given) or draw(*given)
    )
    return calls


def test_a_column_for_each_step_of_each_run(runs, drawn, tmp_path, call):
    out = tmp_path / "samples.png"
    ended = call(draw_samples.main, f"{runs[0]}:2,4", runs[1], "--questions", "3,1", "--out", out)
    assert (ended.returncode, ended.stderr) == (0, f"{out}\n")
    ((_, images, columns, dpi),) = drawn
    assert list(columns) == ["one,\nafter step 2", "one,\nafter step 4", "two,\nafter step 4"]
    lines = [json.loads(line) for line in (runs[0] / "samples.jsonl").read_text().splitlines()]
    asked = [line["where"] for line in lines if line["step"] == 2]
    assert list(images) == [asked[2], asked[0]]
    assert columns["one,\nafter step 2"] == {
        line["where"]: line for line in lines if line["step"] == 2
    }
    with Image.open(out) as picture:
        assert picture.mode == "P" and picture.width > 3 * dpi
    before = out.read_bytes()
    again = call(draw_samples.main, runs[0], "--out", out)
    assert again.returncode == 2 and out.read_bytes() == before
    assert again.stderr.endswith(
        "stays as it is; name another file with --out, or give --replace\n"
    )
    assert call(draw_samples.main, runs[0], "--out", out, "--replace").returncode == 0
    assert out.read_bytes() != before
    for inside in (runs[0] / "curves.png", runs[0] / "new.png"):
        refused = call(draw_samples.main, runs[0], "--out", inside, "--replace")
        assert refused.returncode == 2 and "lies in a folder that this command reads" in (
            refused.stderr
        )


@pytest.mark.parametrize(
    ("steps", "flags", "message"),
    [
        (":3", (), "samples.jsonl: has no answers after step 3; it has 2, 4"),
        ("", ("--questions", "5"), "--questions: there are questions 1 to 4"),
        ("", ("--questions", "0"), "--questions: there are questions 1 to 4"),
        ("", ("--questions", "a"), "'a' is not a list of numbers such as 1,3"),
        ("/elsewhere", (), "elsewhere/samples.jsonl: holds no answers"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(runs, tmp_path, call, steps, flags, message):
    out = tmp_path / "samples.png"
    ended = call(draw_samples.main, f"{runs[0]}{steps}", *flags, "--out", out)
    assert ended.returncode == 2 and not out.exists()
    assert message in ended.stderr and ended.stderr.count("\n") == 1


def test_runs_on_other_data_or_data_that_is_gone(runs, tmp_path, call):
    other, out = tmp_path / "other", tmp_path / "samples.png"
    shutil.copytree(runs[0], other)
    text = (other / "samples.jsonl").read_text()
    (other / "samples.jsonl").write_text(text.replace("val.jsonl:", "val.jsonl:9"))
    ended = call(draw_samples.main, runs[0], other, "--out", out)
    assert "asked no question in common" in ended.stderr
    ended = call(draw_samples.main, other, "--out", out)
    assert ended.returncode == 2 and "is no usable record" in ended.stderr and not out.exists()
