"""`python -m nanovlm.evaluation --benchmark NAME` from files to one JSON line."""

import json

import pytest

from nanovlm.evaluation import __main__ as evaluation
from nanovlm.evaluation.benchmarks import command, mmbench, pope
from tests.evaluation.benchmarks.files import (
    mmbench_rows,
    mmstar_rows,
    put_parquet,
    put_pope,
    put_tsv,
)

COLUMNS = {"image", "blind", "shuffled", "image_minus_blind", "image_minus_shuffled"}


@pytest.fixture
def ask(tiny, call):
    """Run the command; its JSON line and what it says."""

    def asked(*flags):
        machine = ("--device", "cpu", "--dtype", "float32", "--max-new-tokens", "3")
        done = call(evaluation.main, "--model", tiny.model, *machine, *flags)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") == 1
        return json.loads(done.stdout), done.stderr

    return asked


@pytest.mark.parametrize("by", command.WAYS)
def test_pope(tmp_path, ask, by):
    for split in pope.SPLITS:
        put_pope(tmp_path, split, ["yes", "no"] * 3)
    answers = tmp_path / "answers.jsonl"
    result, said = ask(
        "--benchmark", "pope", "--by", by, "--data", f"{tmp_path}/*.json", "--answers", answers
    )
    assert result.keys() - {"unread"} == {"benchmark", "by", "n", "chance", "parts"} | COLUMNS
    assert result["n"] == 18 and result["parts"]["split"].keys() == set(pope.SPLITS)
    for column in COLUMNS:
        assert result[column].keys() == {*pope.METRICS, "interval"}
    assert ("unread" in result) == (by == "generation")
    if by == "generation":  # the weights are random: no answer says yes or no
        assert result["unread"] == {"image": 18, "blind": 18, "shuffled": 18}
        assert result["image"]["yes_ratio"] == 1 and said.count("\nnot read: ") == 6
        assert "18 image, 18 blind, 18 shuffled of 18 answers each" in said
    assert "accuracy (95 %)" in said and "adversarial" in said
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    right = [line["correct"]["image"] for line in lines]
    assert len(lines) == 18 and sum(right) / 18 == pytest.approx(
        result["image"]["accuracy"], abs=1e-6
    )
    if by == "likelihood":
        assert {line["image"] for line in lines} <= set(pope.CHOICES)
        assert right == [line["image"] == line["right"] for line in lines]


@pytest.mark.parametrize("by", command.WAYS)
def test_mmbench(tmp_path, ask, by):
    path = put_tsv(tmp_path / "MMBench_DEV_EN.tsv", mmbench_rows(5))
    answers = tmp_path / "answers.jsonl"
    result, _ = ask("--benchmark", "mmbench", "--by", by, "--data", path, "--answers", answers)
    assert result["n"] == 5 and result["parts"].keys() == set(mmbench.KINDS)
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(lines) == 4 + 3 + 2 + 4 + 3
    hits = {}
    for line in lines:
        hits.setdefault(line["where"], []).append(line["correct"]["image"])
    accuracy = sum(map(all, hits.values())) / 5
    assert result["image"]["accuracy"] == pytest.approx(accuracy)


def test_mmstar(tmp_path, ask):
    path = put_parquet(tmp_path / "mmstar.parquet", mmstar_rows(6))
    result, said = ask("--benchmark", "mmstar", "--data", path, "--limit", "4")
    assert result["by"] == "likelihood" and result["n"] == 4 and result["chance"] == 0.25
    assert result["parts"].keys() == {"category", "l2_category"} and "skipped" not in said


def test_a_question_that_cannot_be_asked_counts_in_no_column(tmp_path, ask, capsys):
    rows = mmbench_rows(5)
    rows[1]["image"] = rows[1]["image"][:400]  # cut off, which only opening it shows
    path = put_tsv(tmp_path / "t.tsv", rows)
    result, said = ask("--benchmark", "mmbench", "--data", path)
    assert result["n"] <= 4  # the shuffled image of another question is this one, too
    assert f"skipped: {path}:" in said and "of 5 questions, which do not count" in said


def test_missing_photos(tmp_path, tiny, call):
    path = put_pope(tmp_path, "random", ["yes"] * 6)
    (tmp_path / "COCO_val2014_000000000001.jpg").unlink()
    flags = ("--model", tiny.model, "--benchmark", "pope", "--data", path, "--device", "cpu")
    done = call(evaluation.main, *flags)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: 2 of 6 records cannot be used")
    assert "000000000001.jpg does not exist" in done.stderr
    put_pope(tmp_path / "one", "random", ["yes"] * 6, images=6)
    (tmp_path / "one" / "COCO_val2014_000000000001.jpg").unlink()
    done = call(evaluation.main, *flags[:4], "--data", f"{tmp_path}/one/*.json", "--device", "cpu")
    assert done.returncode == 0 and json.loads(done.stdout)["n"] == 5
    assert "skipped: 1 of 6 records" in done.stderr


def test_flags_that_do_not_fit_are_refused_in_one_line(tmp_path, tiny, call):
    table = put_tsv(tmp_path / "t.tsv", mmbench_rows())
    data = ("--model", tiny.model, "--data", table)
    for flags, expected in (
        (("--by", "likelihood"), "--by is for --benchmark"),
        (("--benchmark", "mmbench", "--loss"), "leave out --loss or --benchmark"),
        (("--benchmark", "mmbench", "--control", "blind"), "always asked with all controls"),
        (("--benchmark", "mmbench", "--gallery", "g.html"), "a gallery is of records"),
        (("--benchmark", "mmbench", "--images", tmp_path), "stand in its table"),
        (("--benchmark", "mmbench", "--beams", "2"), "answered greedily"),
        (("--benchmark", "mme"), "invalid choice: 'mme'"),
        (("--benchmark", "mmbench", "--answers", table), "is read by this command"),
        (("--benchmark", "pope"), "t.tsv: is no JSON"),
        (("--benchmark", "mmstar"), "t.tsv: has no column l2_category, but "),
    ):
        done = call(evaluation.main, *data, *flags)
        assert done.returncode == 2 and expected in done.stderr, flags
        assert done.stderr.count("\n") == 1 and done.stdout == ""
