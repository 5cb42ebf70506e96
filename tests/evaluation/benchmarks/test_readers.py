"""The published files of POPE, MMBench and MMStar, and what stands in their place."""

import re

import pytest

from nanovlm.errors import NanoVLMError
from nanovlm.evaluation.benchmarks import mmbench, mmstar, pope
from nanovlm.evaluation.benchmarks.questions import letters_in
from nanovlm.inputs.image import open_image
from tests.evaluation.benchmarks.files import (
    COLOURS,
    base64_of,
    jpeg,
    mmbench_rows,
    mmstar_rows,
    put_parquet,
    put_pope,
    put_tsv,
    rotated_rows,
)


def asked(question) -> str:
    return question.record.messages[0].text


def colour(question) -> tuple[int, int, int]:
    """Of the image, in steps that JPEG does not blur."""
    pixel = open_image(question.record.images[0]).getpixel((5, 5))
    return tuple(round(value / 128) for value in pixel)


def test_pope_keeps_its_splits_and_puts_questions_of_one_photo_together(tmp_path):
    for split in ("random", "popular", "adversarial"):
        put_pope(tmp_path / "coco", split, ["yes", "no", "no", "yes"])
    questions, skipped = pope.read(f"{tmp_path}/coco/coco_pope_*.json", None)
    assert not skipped and len(questions) == 12
    images = [question.record.images[0].name for question in questions]
    assert images == sorted(images) and len(set(images)) == 3
    assert [question.parts["split"] for question in questions if "thing 2" in asked(question)] == [
        "adversarial", "popular", "random"]  # fmt: skip
    right = {asked(question).strip(): question.choices[question.right] for question in questions}
    assert right["Is there a thing 0 in the image?"] == "Yes"
    assert right["Is there a thing 2 in the image?"] == "No"
    few, _ = pope.read(f"{tmp_path}/coco/coco_pope_*.json", None, limit=2)
    assert len(few) == 6 and {question.parts["split"] for question in few} == {
        "random", "popular", "adversarial"}  # fmt: skip
    elsewhere = tmp_path / "coco_pope_random.json"
    elsewhere.write_bytes((tmp_path / "coco" / "coco_pope_random.json").read_bytes())
    assert len(pope.read(str(elsewhere), tmp_path / "coco")[0]) == 4
    with pytest.raises(NanoVLMError, match="does not exist; say with --images where the images"):
        pope.read(str(elsewhere), None)  # the photos are not beside it


def test_photos_that_are_missing_are_counted_and_named(tmp_path):
    path = put_pope(tmp_path, "random", ["yes"] * 6)
    (tmp_path / "COCO_val2014_000000000001.jpg").unlink()
    questions, skipped = pope.read(str(path), None)
    assert len(questions) == 4 and len(skipped) == 2
    assert skipped[0] == (
        f"{path}:2: image {tmp_path / 'COCO_val2014_000000000001.jpg'} does not exist"
    )


@pytest.mark.parametrize("rotated", [False, True])
def test_mmbench_asks_every_rotation_once(tmp_path, rotated):
    """Rotations that the table has, and those that are made, are the same questions."""
    rows = mmbench_rows()
    path = put_tsv(tmp_path / "MMBench_DEV_EN.tsv", rotated_rows(rows) if rotated else rows)
    questions, skipped = mmbench.read(str(path), None)
    assert not skipped and len(questions) == 4 + 3 + 2
    assert [question.unit for question in questions] == ["7"] * 4 + ["8"] * 3 + ["9"] * 2
    for question in questions:
        row = rows[int(question.unit) - 7]
        assert question.options[question.right] == row[row["answer"]]
        assert colour(question)[:3] == tuple(
            round(value / 128)
            for value in open_image(jpeg(COLOURS[int(question.unit) - 7])).getpixel((5, 5))
        )
        assert question.parts == {"l2-category": "perception", "category": row["category"]}
    first = questions[:4]
    assert {question.options for question in first} == {
        first[0].options[shift:] + first[0].options[:shift] for shift in range(4)
    }
    assert sorted(question.right for question in first) == [0, 1, 2, 3]
    assert asked(questions[0]).strip() == (
        "Look,\nthen answer.\nWhat is shown in image 0?\nA. a red cup\nB. a green hat\n"
        "C. one blue car\nD. the white sea\n"
        "Answer with the option's letter from the given choices directly."
    )
    two, _ = mmbench.read(str(path), None, limit=2)
    assert [question.unit for question in two] == ["7"] * 4 + ["8"] * 3


def test_mmbench_in_chinese_asks_in_chinese_and_a_group_may_be_named(tmp_path):
    rows = mmbench_rows(1)
    rows[0] |= {"question": "图中是什么？", "hint": ""}
    rows = [{**row, "g_index": 7} for row in rotated_rows(rows)]
    for number, row in enumerate(rows):
        row["index"] = 7 + number
    path = put_tsv(tmp_path / "MMBench_DEV_CN_V11.tsv", rows)
    questions, skipped = mmbench.read(str(path), None)
    assert not skipped and {question.unit for question in questions} == {"7"}
    assert asked(questions[0]).endswith("\n请直接回答选项字母。")


def test_a_question_is_left_out_with_all_its_rotations(tmp_path):
    rows = rotated_rows(mmbench_rows())
    rows[3]["answer"] = "E"  # a rotation of the first question
    rows[1]["image"] = ""
    path = put_tsv(tmp_path / "t.tsv", rows)
    questions, skipped = mmbench.read(str(path), None)
    assert {question.unit for question in questions} == {"9"}
    assert any(line.endswith("its answer is 'E', and its options are ABCD") for line in skipped)
    assert any(line.endswith("has no image") for line in skipped)
    assert sum("names the image of row '8', which is not there" in line for line in skipped) == 2


def test_rotations_that_are_missing_are_said(tmp_path, capsys):
    path = put_tsv(tmp_path / "whole.tsv", rotated_rows(mmbench_rows()))
    mmbench.read(str(path), None)
    assert not capsys.readouterr().err
    rows = [row for row in rotated_rows(mmbench_rows()) if row["index"] != 1000008]
    questions, skipped = mmbench.read(str(put_tsv(tmp_path / "short.tsv", rows)), None)
    assert len(questions) == 4 + 2 + 2 and not skipped
    said = "1 of 3 questions have fewer rotations than options, such as index 8; "
    assert said in capsys.readouterr().err


def test_two_questions_of_one_index_are_not_taken_for_rotations(tmp_path):
    rows = mmbench_rows()
    rows[1]["index"] = 7
    path = put_tsv(tmp_path / "t.tsv", rows)
    questions, skipped = mmbench.read(str(path), None)
    assert {question.unit for question in questions} == {"9"}
    (line,) = skipped
    assert " its index is 7, that of " in line


@pytest.mark.parametrize("form", ["tsv", "parquet", "struct", "columns"])
def test_mmstar_in_its_forms(tmp_path, form):
    rows = mmstar_rows()
    if form == "columns":
        for row in rows:
            row |= {"question": "Which?", **dict(zip("ABCD", ("red", "green", "blue", "white")))}
    if form in ("tsv", "columns"):
        rows = [{**row, "image": base64_of(COLOURS[n])} for n, row in enumerate(rows)]
        path = put_tsv(tmp_path / "MMStar.tsv", rows)
    else:
        if form == "struct":  # as the hub's library writes images
            rows = [{**row, "image": {"bytes": row["image"], "path": None}} for row in rows]
        path = put_parquet(tmp_path / "mmstar.parquet", rows)
    questions, skipped = mmstar.read(str(path), None)
    assert not skipped and [question.right for question in questions] == [0, 1, 2, 3]
    assert all(question.choices == ("A", "B", "C", "D") for question in questions)
    listed = "\nD. white\n" if form == "columns" else ", D: white.\n"
    assert all(listed + "Answer with the option" in asked(question) for question in questions)
    assert questions[1].parts == {"category": "math", "l2_category": "geometry"}
    assert len({colour(question) for question in questions}) == 4
    assert len(mmstar.read(str(path), None, limit=3)[0]) == 3


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("Which?\nOptions: A: on the book., B: beneath the cat., C: in it.", "ABC"),
        ("Hint: e.g., A, B, C, D, at the end.\nChoices:\n(A) 30°\n(B) 45°", "AB"),
        ("A. one B. two C. three D. four E. five", "ABCDE"),
        ("Q: What is it?", "ABCD"),
        ("What is vitamin A: a thing?", "ABCD"),
    ],
)
def test_letters_that_a_question_lists(text, letters):
    assert letters_in(text) == tuple(letters)


def test_what_is_no_benchmark_is_named(tmp_path):
    table = put_tsv(tmp_path / "t.tsv", [{"index": 1, "question": "?", "x": "y"}])
    without = put_tsv(tmp_path / "test.tsv", [{**row, "answer": ""} for row in mmbench_rows()])
    (tmp_path / "e.json").write_text("")
    (tmp_path / "o.jsonl").write_text('{"image": "a.jpg", "messages": []}\n')
    (tmp_path / "photo.jpg").write_bytes(jpeg("red"))
    (tmp_path / "list.json").write_text("[1, 2]")
    cases = (
        (mmbench, table, r"t.tsv: has no column image, a, b, but 'index, question, x'; the tables"),
        (mmstar, table, r"t.tsv: has no column answer, category, l2_category, image, but"),
        (mmbench, without, "none of its 3 questions has an answer; those of the test split"),
        (mmstar, tmp_path / "photo.jpg", "photo.jpg: is a JPEG image"),
        (pope, tmp_path / "photo.jpg", "photo.jpg: is a JPEG image"),
        (pope, tmp_path / "e.json", "holds no questions; the files of POPE hold one JSON object"),
        (mmstar, tmp_path / "list.json", "holds no row that can be read"),
        (mmbench, tmp_path / "gone.tsv", "gone.tsv: cannot be read"),
        (mmbench, f"{table},{without}", "2 files; this benchmark is scored on one at a time"),
    )
    for benchmark, path, expected in cases:
        with pytest.raises(NanoVLMError, match=expected):
            benchmark.read(str(path), None)
    questions, skipped = pope.read(str(tmp_path / "o.jsonl"), None)
    assert not questions and re.search(r"o.jsonl:1: is .*; the files of POPE hold", skipped[0])
