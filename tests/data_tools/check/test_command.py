"""The command: what it says, writes and leaves out."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from data_tools.check import __main__ as check
from data_tools.check.findings import KINDS
from data_tools.check.reading import reason_of
from nanovlm.data.records import read_records
from tests.data_tools.check.test_images import photo, saved
from tests.pages import REPOSITORY

HOSTILE = '</pre><script>alert(1)</script><img src=x onerror="alert(2)"> & \' " \x1b[31m \u202e ]]>'


def record(image: str, question: str, answer: str, **more) -> dict:
    turns = [
        {"role": "user", "content": f"<image>\n{question}"},
        {"role": "assistant", "content": answer},
    ]
    return {"image": image, "messages": turns, **more}


@pytest.fixture
def world(tmp_path) -> Path:
    """Twelve good records, and one for each kind of trouble."""
    folder = tmp_path / "in"
    (folder / "images").mkdir(parents=True)
    for number in range(12):
        saved(photo(number), folder / "images" / f"{number}.png")
    saved(photo(0), folder / "images" / "copy.bmp")
    saved(photo(1), folder / "images" / "small.jpg", quality=60)
    saved(photo(50), folder / "images" / "held.png")
    saved(photo(50).resize((80, 60)), folder / "images" / "leak.png")
    saved(Image.new("RGB", (64, 64), "white"), folder / "images" / "white.png")
    (folder / "images" / "cut.png").write_bytes((folder / "images" / "2.png").read_bytes()[:300])
    good = [
        record(f"images/{n}.png", "用一句话描述这张图片。", f"第{n}张图片里有一只猫。")
        for n in range(12)
    ]
    bad = [
        record("images/copy.bmp", "描述图片", "一只黑色的猫。"),  # duplicates
        record("images/small.jpg", "描述图片", "一只白色的猫。"),  # near-duplicates
        record("images/leak.png", "描述图片", "一只黄色的猫。"),  # leaked
        record("images/white.png", "描述图片", "什么都看不见。"),  # blank
        record("images/cut.png", "描述图片", "一只红色的猫。"),  # broken
        record("images/3.png", "描述图片", "。"),  # empty
        record("images/4.png", "描述图片", "一只猫在跑，" * 9),  # repeated
        record("images/5.png", "这是什么？", "ä½\xa0å¥½"),  # garbled
        record("images/6.png", "这是什么？", "图片加载失败"),  # boilerplate
        record("images/7.png", "图中的人在做什么？", "图中的人在做什么？"),  # copied
        record("images/8.png", "请详细描述这张图片。", "猫。"),  # short
        record("images/9.png", HOSTILE, HOSTILE),
        record("none.png", "?", "1"),  # skipped
        record("images/1.png", "<image>?", "2"),  # skipped
    ]
    lines = [json.dumps(entry, ensure_ascii=False) for entry in good + bad]
    (folder / "data.jsonl").write_text("\n".join([*lines, "{", ""]), encoding="utf-8")
    held = record("images/held.png", "描述图片", "一只黄色的猫。")
    (folder / "val.jsonl").write_text(json.dumps(held) + "\n")
    return folder


EXPECTED = {
    "broken": 1, "leaked": 1, "duplicates": 1, "near-duplicates": 1, "blank": 1, "empty": 1,
    "repeated": 1, "garbled": 2, "boilerplate": 1, "copied": 2, "short": 1,
}  # fmt: skip


def test_every_kind_of_trouble_is_counted_and_named(world, call):
    data = world / "data.jsonl"
    done = call(check.main, data, "--val", world / "val.jsonl", "--json", "--workers", "1")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    split = report["splits"]["data"]
    found = {kind: each["records"] for kind, each in split["findings"].items()}
    assert found == EXPECTED and found.keys() <= KINDS.keys()
    places = {kind: each["examples"][0]["where"] for kind, each in split["findings"].items()}
    assert places["duplicates"] == f"{data}:13" and places["leaked"] == f"{data}:15"
    assert split["findings"]["leaked"]["examples"][0]["detail"].startswith(
        f"nearly the same as in {world / 'val.jsonl'}:1"
    )
    assert (split["records"], split["usable"], split["skipped"]) == (27, 24, 3)
    assert split["training_stops"] and len(split["skipped_for"]) == 3
    assert split["images"]["formats"] == {"BMP": 1, "JPEG": 1, "PNG": 14}
    assert split["images"]["broken"] == 1 and split["languages"]["Chinese"] == 22
    assert split["most_common_questions"][0] == {"text": "用一句话描述这张图片。", "count": 12}
    text = call(check.main, data, "--workers", "0").stdout
    assert "  records    27, training can use 23" in text  # of the 24, one has a broken image
    assert f"{data}:13: the same pixels as in {data}:1" in text and "training would stop" in text
    assert "\x1b" not in text and "\u202e" not in text  # of the hostile record


@pytest.mark.skipif(sys.platform != "linux", reason="names there are text")
def test_names_that_are_no_text_are_shown_and_written(world, tmp_path, call):
    folder = tmp_path / "\udcff"
    world.rename(folder)
    done = call(check.main, folder / "data.jsonl", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["inputs"]["data"] == str(folder / "data.jsonl")
    flags = ("--drop", "broken", "--keep")
    refused = call(check.main, folder / "data.jsonl", *flags, tmp_path / "kept.jsonl")
    assert refused.returncode == 2 and "is no UTF-8 text" in refused.stderr
    assert not (tmp_path / "kept.jsonl").exists()
    assert call(check.main, folder / "data.jsonl", *flags, folder / "kept.jsonl").returncode == 0
    assert len(read_records(folder / "kept.jsonl")[0]) == 23


def test_the_report_does_not_depend_on_the_workers_and_is_written_whole(world, tmp_path, call):
    files = []
    for workers in ("0", "2"):
        out = tmp_path / f"out{workers}"
        flags = ("--val", world / "val.jsonl", "--out", out, "--workers", workers)
        done = call(check.main, world / "data.jsonl", *flags)
        assert done.returncode == 0 and "report.html" in done.stderr
        assert sorted(path.name for path in out.iterdir()) == [
            "report.html",
            "report.json",
            "samples.png",
        ]
        files.append([(out / name).read_bytes() for name in ("report.json", "report.html")])
    assert files[0] == files[1]
    with Image.open(tmp_path / "out2" / "samples.png") as sheet:
        assert sheet.width > 1000 and sheet.height > 1000


class Page(HTMLParser):
    """The elements of a page, with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words += data


def test_the_page_runs_nothing_loads_nothing_and_shows_hostile_text_as_it_is(world, tmp_path, call):
    call(check.main, world / "data.jsonl", "--val", world / "val.jsonl", "--out", tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert tags <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "small", "p", "pre", "nav",
        "a", "div", "b", "img",
    }  # fmt: skip
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        if tag == "img":
            assert re.fullmatch(r"data:image/jpeg;base64,[\w+/=]+", attributes["src"])
        assert attributes.get("href", "#").startswith("#")
    assert "@import" not in text and "url(" not in text
    assert "<script>alert(1)</script>" in page.words and "ä½" in page.words
    assert "\x1b" not in text and "\u202e" not in text
    assert "一只猫在跑" in page.words and "prefers-color-scheme: dark" in text
    anchors = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert anchors == {f"data-{kind}" for kind in EXPECTED}


def test_what_is_dropped_is_counted_and_the_rest_stays_as_it_was(world, tmp_path, call):
    lines = (world / "data.jsonl").read_text(encoding="utf-8").splitlines()
    kept = world / "kept.jsonl"
    drop = "broken,duplicates,near-duplicates,leaked,garbled,boilerplate,empty,repeated,too-long"
    flags = ("--val", world / "val.jsonl", "--drop", drop)
    done = call(check.main, world / "data.jsonl", *flags, "--keep", kept)
    assert done.returncode == 0
    assert f"{kept}: 15 records; dropped: 1 broken, 1 duplicates, 1 near-duplicates" in done.stderr
    assert "0 too-long; 3 skipped by training" in done.stderr
    good = [json.loads(line) for line in [*lines[:12], lines[15], lines[21], lines[22]]]
    assert [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()] == good
    (tmp_path / "sub").mkdir()
    moved = tmp_path / "sub" / "kept.jsonl"
    assert call(check.main, world / "data.jsonl", *flags, "--keep", moved).returncode == 0
    records, skipped = read_records(moved)
    assert not skipped and [r.images[0].resolve() for r in records] == [
        r.images[0].resolve() for r in read_records(kept)[0]
    ]
    again = call(check.main, kept, "--drop", drop, "--keep", moved)
    assert again.returncode == 2 and "is there already and stays as it is" in again.stderr
    clean = call(check.main, kept, "--drop", drop, "--keep", tmp_path / "again.jsonl")
    assert clean.returncode == 0 and "again.jsonl: 15 records" in clean.stderr


def test_lengths_and_too_long_records(tiny, tmp_path, call):
    data = tiny.data / "train.jsonl"
    flags = ("--model", tiny.model, "--max-length", "40", "--workers", "0")
    kept = tmp_path / "kept.jsonl"
    done = call(check.main, data, *flags, "--json", "--drop", "too-long", "--keep", kept)
    assert done.returncode == 0
    report = json.loads(done.stdout)
    lengths, found = report["lengths"], report["splits"]["data"]["findings"]
    assert [*found] == ["too-long"] and found["too-long"]["records"] > 0
    assert lengths["cut_records"] + lengths["skipped_records"] == found["too-long"]["records"]
    assert report["kept"]["too-long"] == found["too-long"]["records"]
    after = json.loads(call(check.main, kept, *flags, "--json").stdout)
    assert after["splits"]["data"]["findings"] == {} and after["lengths"]["cut_records"] == 0
    text = call(check.main, data, *flags[:4]).stdout
    assert "--max-length 40 cuts" in text and "--pack 40 --bucket 32" in text


def test_the_toy_world_is_clean_and_shares_no_image_with_its_splits(tiny, call):
    done = call(
        check.main, tiny.data / "train.jsonl", "--val", tiny.data / "val.jsonl", "--strict",
        "--against", tiny.data / "novel.jsonl",
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.count("no findings") == 2, done.stdout


def test_strict_fails_on_findings(world, call):
    assert call(check.main, world / "data.jsonl", "--strict").returncode == 1
    assert call(check.main, world / "val.jsonl", "--strict").returncode == 0


def test_pairs_of_answers_and_shards_are_read_as_training_reads_them(world, tmp_path, call):
    pair = {"image": "images/1.png", "prompt": "?", "chosen": "图片加载失败", "rejected": "no"}
    (world / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    report = json.loads(call(check.main, world / "pairs.jsonl", "--json").stdout)
    assert report["splits"]["data"]["findings"]["boilerplate"]["records"] == 1
    moved = json.loads((world / "val.jsonl").read_text())
    (tmp_path / "elsewhere.jsonl").write_text(json.dumps(moved) + "\n")
    found = call(check.main, tmp_path / "elsewhere.jsonl", "--images", world, "--json")
    assert json.loads(found.stdout)["splits"]["data"]["usable"] == 1


@pytest.mark.parametrize(
    "flags, expected",
    [
        (("--drop", "broken"), "give both, or none of them"),
        (("--keep", "k.jsonl"), "give both, or none of them"),
        (
            ("--drop", "boring", "--keep", "k.jsonl"),
            "no finding is called boring; there are broken",
        ),
        (("--drop", "broken", "--keep", "data.jsonl"), "is read by this command"),
        (("--out", "images"), "images: holds "),
        (("--model", "x", "--tokenizer", "y"), "leave out --tokenizer or --model"),
        (("--max-length", "0"), "have to be above 0"),
        (("--val", "none.jsonl"), "none.jsonl: cannot be read"),
        (("--images", "nowhere"), "nowhere: is not a folder"),
        (("--model", "."), "config.json"),
        (("--tokenizer", "."), "holds no tokenizer"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(world, call, monkeypatch, flags, expected):
    monkeypatch.chdir(world)
    before = sorted(world.rglob("*")), (world / "data.jsonl").read_bytes()
    done = call(check.main, "data.jsonl", *flags)
    assert done.returncode == 2 and expected in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert (sorted(world.rglob("*")), (world / "data.jsonl").read_bytes()) == before


def test_one_file_by_two_names_is_no_copy_of_itself(world, call, monkeypatch):
    entry = record("images/1.png", "这是什么？", "一只猫。")
    entries = [
        entry,
        {**entry, "image": "images/../images/1.png", "messages": entry["messages"][:1]},
    ]
    entries[1]["messages"] = [entries[1]["messages"][0], {"role": "assistant", "content": "狗。"}]
    (world / "twice.jsonl").write_text("".join(json.dumps(each) + "\n" for each in entries))
    (world / "once.jsonl").write_text(json.dumps(entry) + "\n")
    monkeypatch.chdir(world)
    report = json.loads(call(check.main, "twice.jsonl", "--json").stdout)["splits"]["data"]
    assert report["findings"] == {} and report["images"]["files"] == 1
    leaked = json.loads(
        call(check.main, "twice.jsonl", "--val", world / "once.jsonl", "--json").stdout
    )
    assert leaked["splits"]["data"]["findings"]["leaked"]["records"] == 2


def test_reasons_are_the_same_for_records_that_differ_in_names_and_numbers():
    lines = (
        "data.jsonl:17: image images/a b.jpg does not exist",
        "other/data.jsonl:3: image x/c.png does not exist",
        "d.json: record 4: has a part 'abc', expected text or an image",
        'd.json: record 5: has a part "it\'s", expected text or an image',
        "d.jsonl:5: the text has 2 <image> markers and the record 1 images",
    )
    reasons = [reason_of(line) for line in lines]
    assert reasons[1] == "image … does not exist" and reasons[2] == reasons[3]
    assert reasons[4] == "the text has N <image> markers and the record N images"
    assert reason_of("a.jsonl:7: is not UTF-8 text") == "is not UTF-8 text"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_documentation_names_every_finding(language):
    page = (REPOSITORY / "docs" / language / "data.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE)[-len(KINDS) :] == [*KINDS]
