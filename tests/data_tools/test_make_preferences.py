"""Preference pairs: a right description and one with a wrong object; same seed, same pairs."""

import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from data_tools import make_preferences
from data_tools.make_preferences import make_pairs, names_wrong_object, other_pairs, spoil
from data_tools.scenes_text import describe, parse_description
from data_tools.scenes_world import TRAIN_PAIRS, random_scene
from nanovlm.data.preferences import read_pairs
from nanovlm.data.records import read_records
from nanovlm.inputs.chat import IMAGE


@pytest.fixture(scope="module")
def records(tiny):
    records, _ = read_records(tiny.data / "train.jsonl")
    return [record for record in records if record.extra["kind"] == "describe"]


@pytest.mark.parametrize("language", ["zh", "en"])
def test_a_spoiled_description_differs_in_one_object(language):
    more = Counter()
    for seed in range(600):
        scene = random_scene(Random(seed), TRAIN_PAIRS)
        right = parse_description(describe(scene, language))
        wrong = parse_description(spoil(scene, Random(seed), language))
        assert max((wrong - right).total(), (right - wrong).total()) == 1
        more[wrong.total() - right.total()] += 1
    # Wrong descriptions name too many objects as often as too few.
    assert more.keys() == {-1, 0, 1} and more[0] > 250 and 0.8 < more[1] / more[-1] < 1.25


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        ("图中有一个物体：大的红色圆形。", False),  # one is missing, but none is wrong
        ("图中有两个物体，从左到右是：小的蓝色心形、大的红色圆形。", False),
        ("图中有两个物体，从左到右是：大的红色圆形、大的蓝色心形。", True),
        ("图中有三个物体，从左到右是：大的红色圆形、小的蓝色心形、小的蓝色心形。", True),
        ("There are two objects, from left to right: a big red circle, a small blue ring.", True),
        # A wrong count: not a description.
        ("图中有三个物体，从左到右是：大的红色圆形、小的蓝色圆环。", False),
        ("是。", False),
    ],
)
def test_what_counts_as_a_wrong_object(answer, wrong):
    right = "图中有两个物体，从左到右是：大的红色圆形、小的蓝色心形。"
    assert names_wrong_object(answer, right) is wrong


def test_the_models_own_wrong_answers_and_spoiled_ones(tiny, records, monkeypatch):
    wrong = "There is one object: a big red star."
    sampled = []

    def answers(model, asked, *_, sampling):
        sampled.append(sampling)
        return iter([wrong if number % 2 else "?" for number in range(len(asked))])

    monkeypatch.setattr(make_preferences, "answer_records", answers)
    pairs = make_pairs(records, model=tiny, samples=3, temperature=0.7, spoiled=0.5, seed=4)
    assert [sampling.seed for sampling in sampled] == [4, 5, 6]
    assert {sampling.temperature for sampling in sampled} == {0.7}
    kinds = Counter(pair["kind"] for pair in pairs)
    assert kinds["own"] == len(records) // 2  # the same answer counts once
    assert 0 < kinds["spoiled"] < len(records)
    assert all(pair["rejected"] == wrong for pair in pairs if pair["kind"] == "own")
    assert pairs == make_pairs(records, model=tiny, samples=3, temperature=0.7, spoiled=0.5, seed=4)
    one, other = (make_pairs(records, None, 3, 0.7, 1.0, seed=seed) for seed in (1, 2))
    assert one != other


def test_other_questions_get_another_answer_of_their_kind(tiny):
    records, _ = read_records(tiny.data / "train.jsonl")
    records = [record for record in records if record.extra["kind"] != "describe"]
    pairs = other_pairs(records, 1.0, seed=0)
    assert len(pairs) > 0.8 * len(records) and pairs == other_pairs(records, 1.0, seed=0)
    assert 0.1 < len(other_pairs(records, 0.3, seed=0)) / len(pairs) < 0.6
    verdicts = {"是。": "不是。", "有。": "没有。", "Yes.": "No."}
    verdicts |= {no: yes for yes, no in verdicts.items()}
    for pair in pairs:
        assert pair["chosen"] != pair["rejected"] == verdicts.get(pair["chosen"], pair["rejected"])
        assert pair["chosen"].isascii() == pair["rejected"].isascii()


def test_the_command_writes_pairs_that_training_reads(tiny, records, command, tmp_path):
    out = tmp_path / "pairs.jsonl"
    flags = ("--data", tiny.data / "train.jsonl", "--out", out, "--limit", "5", "--others", "0")
    process = command("data_tools/make_preferences.py", *flags)
    messages = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 0 and "5 pairs from 5 images" in messages
    pairs, skipped = read_pairs(out)
    assert len(pairs) == 5 and not skipped
    for pair, record, line in zip(pairs, records, out.read_text().splitlines()):
        assert pair.messages == record.messages and pair.rejected != record.messages[1].content[0]
        assert Path(pair.images[0]).resolve() == record.images[0].resolve()
        assert not Path(json.loads(line)["image"]).is_absolute()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--spoiled", "2"), "--spoiled and --others are between 0 and 1"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--sample", "1"), "--help"),
    ],
)
def test_what_is_refused(call, tmp_path, flags, expected):
    refused = call(make_preferences.main, "--out", tmp_path / "pairs.jsonl", *flags)
    assert refused.returncode == 2
    assert expected in refused.stderr and refused.stderr.count("\n") == 1


def test_a_caption_of_a_photo_is_wrong_if_no_reference_mentions_a_thing(
    tmp_path, tiny, monkeypatch, call
):
    captions = ["一只狗在草地上跑。", "小狗在玩耍。"]
    Image.new("RGB", (40, 30)).save(tmp_path / "dog.jpg")
    record = {
        "image": "dog.jpg",
        "messages": [{"role": "user", "content": "<image>\n描述图片"}],
        "references": captions,
    }
    (tmp_path / "photos.jsonl").write_text(json.dumps(record) + "\n")
    # Wrong are snow, nothing, a man.
    answers = iter(["一只狗在雪地里。", "一只狗在草地上。", "一个男人和一只狗。", "雪。"])
    monkeypatch.setattr(make_preferences, "answer_records", lambda *_, **__: iter([next(answers)]))
    flags = ("--data", tmp_path / "photos.jsonl", "--out", tmp_path / "pairs.jsonl")
    assert "give --model" in call(make_preferences.main, *flags).stderr
    done = call(make_preferences.main, *flags, "--model", tiny.model, "--samples", "3")
    assert done.returncode == 0 and "2 pairs from 1 images, 2 with the model's own" in done.stderr
    pairs, _ = read_pairs(tmp_path / "pairs.jsonl")
    assert [pair.rejected for pair in pairs] == ["一只狗在雪地里。", "一个男人和一只狗。"]
    assert all(pair.messages[1].content[0] in captions for pair in pairs)
    record["messages"] = [{"role": "user", "content": "看 <image> 写一句话"}]
    (tmp_path / "photos.jsonl").write_text(json.dumps(record) + "\n")
    taken = call(make_preferences.main, *flags, "--model", tiny.model)
    assert taken.returncode == 2 and "pairs.jsonl: is there already and stays" in taken.stderr
    (tmp_path / "pairs.jsonl").unlink()
    call(make_preferences.main, *flags, "--model", tiny.model, "--samples", "1")
    (pair,), _ = read_pairs(tmp_path / "pairs.jsonl")
    assert pair.messages[0].content == ("看 ", IMAGE, " 写一句话")
    nowhere = tmp_path / "nowhere" / "pairs.jsonl"
    assert "is not a folder" in call(make_preferences.main, *flags[:3], nowhere).stderr
    record["messages"].append({"role": "assistant", "content": "一只狗。"})
    record["references"] = []
    (tmp_path / "photos.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "pairs.jsonl").unlink()
    assert "holds neither scenes nor photos" in call(make_preferences.main, *flags).stderr
    over = call(make_preferences.main, *flags[:3], tmp_path / "photos.jsonl")
    assert over.returncode == 2 and "photos.jsonl: is read by this command" in over.stderr
    assert json.loads((tmp_path / "photos.jsonl").read_text()) == record
