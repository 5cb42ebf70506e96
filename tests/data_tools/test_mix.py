"""Mixtures: counts by weight, the same bytes, images that still resolve."""

import json
from base64 import b64encode
from collections import Counter
from pathlib import Path

import pytest

from data_tools import mix
from data_tools.check.reading import entries_of, parse


def record(number: object, image: object = None) -> dict:
    question = {"role": "user", "content": "<image>\n?" if image else "?"}
    entry = {"id": number, "messages": [question, {"role": "assistant", "content": f"{number}"}]}
    return {**entry, "image": image} if image else entry


def write(path: Path, entries: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    path.write_text(text, encoding="utf-8")
    return path


def ids(path: Path) -> list[object]:
    return [json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def sources(tmp_path):
    one = write(tmp_path / "one" / "a.jsonl", [record(f"a{n}") for n in range(40)])
    two = write(tmp_path / "two" / "b.jsonl", [record(f"b{n}") for n in range(10)])
    return one, two


def test_without_weights_every_record_is_taken_once_in_its_own_order(sources, tmp_path, call):
    done = call(mix.main, *sources, "--out", tmp_path / "out.jsonl")
    assert done.returncode == 0
    found = ids(tmp_path / "out.jsonl")
    assert [i for i in found if i[0] == "a"] == [f"a{n}" for n in range(40)]
    assert [i for i in found if i[0] == "b"] == [f"b{n}" for n in range(10)]
    assert found[:40] != [f"a{n}" for n in range(40)]  # they are interleaved
    assert f"{sources[1]}: 10 records taken from 10, each 1.00 times\n" in done.stdout


def test_weights_are_shares_and_repetition_is_said(sources, tmp_path, call):
    one, two = sources
    out = tmp_path / "out.jsonl"
    done = call(mix.main, f"{one}=1", f"{two}=1", "--total", "51", "--out", out)
    found = Counter(ids(out))
    assert sum(found.values()) == 51
    of_two = [found[f"b{n}"] for n in range(10)]
    assert sum(of_two) == 25 and {*of_two} == {2, 3}  # all twice, and five of them once more
    assert all(found[f"a{n}"] <= 1 for n in range(40))
    assert f"{two}: 25 records taken from 10, each 2.50 times, some of them repeated" in done.stdout
    assert f"{one}: 26 records taken from 40, each 0.65 times\n" in done.stdout


def test_the_same_flags_give_the_same_bytes_and_another_seed_others(sources, tmp_path, call):
    flags = (*(f"{source}=1" for source in sources), "--total", "30")
    texts = []
    for name, seed in (("x", 0), ("y", 0), ("z", 1)):
        out = tmp_path / f"{name}.jsonl"
        assert call(mix.main, *flags, "--seed", seed, "--out", out).returncode == 0
        texts.append(out.read_bytes())
    assert texts[0] == texts[1] != texts[2]


def test_images_of_all_forms_resolve_from_the_new_file(tmp_path, call, monkeypatch):
    folder = tmp_path / "data" / "set"
    (folder / "images").mkdir(parents=True)
    for name in ("images/a.jpg", "红.jpg"):
        (folder / name).write_bytes(name.encode())
    uri = "data:image/png;base64," + b64encode(b"x").decode()
    parts = [{"type": "image", "image": "images/a.jpg"}, {"type": "text", "text": "?"}]
    answer = {"role": "assistant", "content": "yes"}
    two = record(2, "红.jpg")
    two["images"] = [two.pop("image"), "images/a.jpg"]
    two["messages"][0]["content"] = "<image><image>?"
    entries = [
        record(1, "images/a.jpg"),
        two,
        record(3, str(folder / "红.jpg")),
        record(4, uri),
        {"id": 5, "messages": [{"role": "user", "content": parts}, answer]},
        {"id": 6, "query": "<img>images/a.jpg</img>?", "response": "yes"},
        {"id": 7, "image": "images/a.jpg", "prompt": "?", "chosen": "yes", "rejected": "no"},
        {
            "id": 8,
            "prompt": [{"role": "user", "content": parts}],
            "chosen": "yes",
            "rejected": "no",
        },
        record(9),
    ]
    source = write(folder / "data.jsonl", entries)

    def read(path: Path) -> list:
        found = [parse(entry, where, base) for where, entry, base in entries_of(path, None)]
        return [
            (
                [p if "data:" in str(p) else p.read_bytes() for p in each.images],
                each.messages,
                each.rejected,
                each.extra,
            )
            for each in found
        ]

    expected = read(source)
    assert call(mix.main, source, "--out", tmp_path / "new.jsonl").returncode == 0
    assert read(tmp_path / "new.jsonl") == expected
    assert json.loads((tmp_path / "new.jsonl").read_text(encoding="utf-8").splitlines()[0]) == {
        **entries[0],
        "image": "data/set/images/a.jpg",
    }
    monkeypatch.chdir(folder)  # as a newcomer types it
    assert call(mix.main, "data.jsonl", "--out", "../../again.jsonl").returncode == 0
    assert read(tmp_path / "again.jsonl") == expected
    assert call(mix.main, "data.jsonl", "--out", "beside.jsonl").returncode == 0
    assert [json.loads(line) for line in Path("beside.jsonl").read_bytes().splitlines()] == entries


def test_records_that_cannot_be_used_are_named_and_left_out(tmp_path, call):
    entries = [record(n) for n in range(150)] + [record("lost", "none.jpg")] + [record(150)]
    source = write(tmp_path / "a.jsonl", entries)
    done = call(mix.main, source, "--out", tmp_path / "out.jsonl")
    assert ids(tmp_path / "out.jsonl") == [*range(151)]
    assert f"skipped: {source}:151: image" in done.stderr
    few = write(tmp_path / "few.jsonl", entries[149:])
    many = call(
        mix.main, write(tmp_path / "b.jsonl", [entries[150]] * 3), few, "--out", tmp_path / "c"
    )
    assert many.returncode == 2 and "3 of 3 records cannot be used" in many.stderr
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("one/a.jsonl=1", "two/b.jsonl"), "'two/b.jsonl' has no weight and others have one"),
        (("one/a.jsonl=0", "two/b.jsonl=1"), "a weight has to be above 0"),
        (("none.jsonl",), "none.jsonl: cannot be read (No such file or directory)"),
        (("one/*.json",), "no file matches this pattern"),
        (("one/a.jsonl", "--total", "-1"), "--total has to be above 0"),
        (("one/a.jsonl", "--out", "one/a.jsonl"), "is read by this command"),
        (("one/a.jsonl", "--out", "two/b.jsonl"), "is there already and stays as it is"),
        (("one/a.jsonl", "--out", "none/b.jsonl"), "is not a folder"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    sources, tmp_path, call, monkeypatch, arguments, expected
):
    monkeypatch.chdir(tmp_path)
    before = [source.read_bytes() for source in sources]
    out = () if "--out" in arguments else ("--out", "new.jsonl")
    done = call(mix.main, *arguments, *out)
    assert done.returncode == 2 and expected in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and not Path("new.jsonl").exists()
    assert [source.read_bytes() for source in sources] == before
