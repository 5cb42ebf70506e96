"""Records of both forms, and a name and a reason for each one that cannot be used."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nanovlm.data import records as records_module
from nanovlm.data.records import (
    check_images,
    check_skipped,
    parse_record,
    read_records,
    record_files,
    say_skipped,
)
from nanovlm.errors import NanoVLMError, see
from nanovlm.inputs.chat import IMAGE, Message

LLAVA = {
    "id": 7,
    "image": "a.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\n几个？"},
        {"from": "gpt", "value": "三个"},
    ],
}
MESSAGES = {
    "images": ["a.jpg", "b.jpg"],
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "<image> or <image>?"},
        {"role": "assistant", "content": "The first <image>."},
    ],
}
TEXT = {"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "Hi"}]}
QUESTION = {
    "image": ["a.jpg"],
    "messages": [{"role": "user", "content": "<image>?"}],
    "references": ["a", "b"],
}
ALL = [LLAVA, MESSAGES, TEXT, QUESTION]


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"an image, which is not opened here")
    return tmp_path


def write(path: Path, entries: list[Any]) -> Path:
    """Entries that are text are written as they are, for lines that are not JSON."""
    if path.suffix == ".json":
        path.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    else:
        lines = [
            entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False)
            for entry in entries
        ]
        path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_both_forms_are_read(folder, name):
    records, skipped = read_records(write(folder / name, ALL))
    assert skipped == []
    llava, messages, text, question = records
    assert llava.messages == (Message("user", (IMAGE, "\n几个？")), Message("assistant", ("三个",)))
    assert llava.images == (folder / "a.jpg",) and llava.references == ()
    assert messages.messages == (
        Message("system", ("Be kind.",)),
        Message("user", (IMAGE, " or ", IMAGE, "?")),
        Message("assistant", ("The first <image>.",)),
    )
    assert messages.images == (folder / "a.jpg", folder / "b.jpg")
    assert (
        text.images == ()
        and question.references == ("a", "b")
        and question.extra == {}
        and llava.extra == {"id": 7}
    )
    separator = ":" if name.endswith("jsonl") else ": record "
    assert [record.where for record in records] == [
        f"{folder / name}{separator}{number}" for number in (1, 2, 3, 4)
    ]


def test_images_may_lie_elsewhere(folder, tmp_path):
    path = write(tmp_path / "data.jsonl", [LLAVA])
    other = tmp_path / "photos"
    other.mkdir()
    (other / "a.jpg").touch()
    assert read_records(path, other)[0][0].images == (other / "a.jpg",)
    with pytest.raises(NanoVLMError, match="nowhere: is not a folder; say with --images"):
        read_records(path, tmp_path / "nowhere")


def test_line_numbers_count_blank_lines_and_a_byte_order_mark_is_no_text(folder):
    path = folder / "data.jsonl"
    path.write_text(
        "\ufeff" + json.dumps(TEXT) + "\n\n  \n" + json.dumps(LLAVA) + "\n\n", encoding="utf-8"
    )
    assert [record.where for record in read_records(path)[0]] == [f"{path}:1", f"{path}:4"]


def test_a_line_separator_inside_a_text_does_not_end_the_line(folder):
    entry = {
        "messages": [
            {"role": "user", "content": "a\u2028b\x85c"},
            {"role": "assistant", "content": "d"},
        ]
    }
    records, _ = read_records(write(folder / "data.jsonl", [entry, TEXT]))
    assert records[0].messages[0].content == ("a\u2028b\x85c",) and records[1].where.endswith(":2")


def turns(*contents: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in contents]}


BAD = {
    "not JSON": ('{"image": ', "is not valid JSON (Expecting value, column 1"),
    "a list over several lines": ("[", "; a list of records belongs in a file named .json"),
    "half of a character": ('{"messages": "\\ud83d"}', "holds '\\ud83d', half of a character"),
    "a number without end": ('{"id": ' + "9" * 5000 + "}", "has a number or a nesting without end"),
    "nested too deep": ("[" * 100_000, "has a number or a nesting without end"),
    "a list": ([1], "is a JSON list, expected an object"),
    "null": (None, "is a JSON NoneType, expected an object"),
    "no turns": ({"image": "a.jpg"}, "has neither messages nor conversations"),
    "empty turns": ({"messages": []}, "has neither messages nor conversations"),
    "turns are text": ({"conversations": "hi"}, "conversations is 'hi', expected a list of turns"),
    "a missing image": (LLAVA | {"image": "c.jpg"}, "c.jpg does not exist"),
    "a folder as image": (LLAVA | {"image": "."}, "is a folder, a pipe, a device"),
    "an image that is a number": (LLAVA | {"image": 3}, "image is not a path or a list of paths"),
    "a list with a number": (
        LLAVA | {"image": ["a.jpg", 3]},
        "image is not a path or a list of paths",
    ),
    "more markers than images": (
        MESSAGES | {"images": ["a.jpg"]},
        "has 2 <image> markers and the record 1 images",
    ),
    "more images than markers": (
        TEXT | {"image": "a.jpg"},
        "the text has 0 <image> markers and the record 1 images",
    ),
    "an unknown role": (
        turns(("user", "a"), ("tool", "b")),
        "a turn has role = 'tool', expected system, user or assistant",
    ),
    "an unknown speaker": (
        {"conversations": [{"from": "function", "value": "a"}]},
        "from = 'function', expected system, user or assistant",
    ),
    "a speaker that is a list": (
        {"conversations": [{"from": ["human"], "value": "a"}]},
        "from = ['human'], expected system, user or assistant",
    ),
    "a turn that is text": ({"messages": ["hi"]}, "a turn is 'hi', expected an object"),
    "no text": (
        turns(("user", "a"), ("assistant", None)),
        "a turn of the assistant has no text in 'content'",
    ),
    "blank text": (
        turns(("user", " \n"), ("assistant", "b")),
        "a turn of the user has no text in 'content'",
    ),
    "text that is a number": (
        turns(("user", 3), ("assistant", "b")),
        "has a part 3, expected text",
    ),
    "no answer": (turns(("user", "a")), "the last turn is not the assistant's"),
    "references after an answer": (
        TEXT | {"references": ["a"]},
        "has to end with the user's question",
    ),
    "references that are text": (
        QUESTION | {"references": "a"},
        "references is not a list of texts",
    ),
    "a reference that is a number": (
        QUESTION | {"references": [3]},
        "references is not a list of texts",
    ),
}


@pytest.mark.parametrize("entry, reason", BAD.values(), ids=BAD.keys())
def test_a_bad_record_is_skipped_and_named_with_its_line(folder, entry, reason):
    path = write(folder / "data.jsonl", [TEXT] * 50 + [entry] + [TEXT] * 49)
    records, skipped = read_records(path)
    assert len(records) == 99 and len(skipped) == 1
    assert skipped[0].startswith(f"{path}:51: ") and reason in skipped[0] and "\n" not in skipped[0]


def test_above_one_percent_the_run_stops_with_the_list(folder):
    bad = [LLAVA | {"image": f"{number}.jpg"} for number in range(60)]
    # Exactly one percent.
    assert len(read_records(write(folder / "data.jsonl", [TEXT] * 5940 + bad))[1]) == 60
    path = write(folder / "data.jsonl", [TEXT] * 5939 + bad)
    with pytest.raises(NanoVLMError) as caught:
        read_records(path)
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        "60 of 5999 records cannot be used, more than 1%; mend or remove them "
        f"({see('skipped-records')}):"
    )
    assert len(lines) == 52 and lines[-1] == "  … and 10 more"
    assert lines[1] == f"  {path}:5940: image {folder / '0.jpg'} does not exist"


def test_check_skipped_counts_against_all_and_one_record_ends_no_run():
    check_skipped(["a", "b"], 200)
    check_skipped(["a"], 2)
    check_skipped([], 0)
    with pytest.raises(NanoVLMError, match="2 of 199 records cannot be used, more than 1%"):
        check_skipped(["a", "b"], 199)
    with pytest.raises(NanoVLMError, match="1 of 1 records cannot be used; mend"):
        check_skipped(["a"], 1)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("data.jsonl", b"", "holds no records"),
        ("data.jsonl", b"\n \n", "holds no records"),
        ("data.json", b"", "holds no records"),
        ("data.json", b"[]", "holds no records"),
        ("data.json", b'[{"a": 1}\n {}]', "2:2: is not valid JSON .Expecting ',' delimiter.; mend"),
        ("data.json", b"[1, ", "1:5: is not valid JSON"),
        ("data.json", b"[" * 99_999, "has a number or a nesting without end"),
        ("data.jsonl", b"\xff\xfe{\0}\0", "is text, in UTF-16: save it as UTF-8"),
        ("data.jsonl", b"\x1f\x8b\x08", "is a gzip file: unpack it first"),
        ("data.json", b'{\n "a": []\n}', "is a JSON object over several lines; write one record a"),
        ("data.csv", b"image,text\na.png,x\n", "is no JSON; records are JSON objects, one a line"),
        ("data.yaml", b"image: a.png\ntext: x\n", "is YAML; records are JSON objects"),
        ("data.parquet", b"PAR1\x15", "is a parquet table: `python -m data_tools.convert`"),
        ("data.jsonl", b"<!DOCTYPE html><html>", "is an HTML page"),
        ("data.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ],
)
def test_a_file_without_records_is_refused(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(NanoVLMError, match=f"{name}:( )?{message}"):
        read_records(folder / name)


def test_a_missing_file_is_named(folder):
    with pytest.raises(
        NanoVLMError, match="none.jsonl: cannot be read .No such file or directory.; check the path"
    ):
        read_records(folder / "none.jsonl")


def test_parse_record_names_the_place_it_is_given(folder):
    with pytest.raises(NanoVLMError, match="^line 7: is a JSON int"):
        parse_record(3, "line 7", folder)


def test_several_files_are_one_list_of_records(folder):
    for name in ("b-2.jsonl", "b-1.jsonl", "a.jsonl"):
        write(folder / name, [TEXT, LLAVA])
    pattern, listed = (
        folder / "b-*.jsonl",
        f"{folder}/b-2.jsonl, {folder}/a.jsonl,{folder}/b-*.jsonl",
    )
    assert record_files(pattern) == [folder / "b-1.jsonl", folder / "b-2.jsonl"]
    assert record_files(listed) == [folder / "a.jsonl", folder / "b-1.jsonl", folder / "b-2.jsonl"]
    records, skipped = read_records(pattern)
    assert skipped == [] and [record.where for record in records] == [
        f"{folder}/b-{shard}.jsonl:{line}" for shard in (1, 2) for line in (1, 2)
    ]


def test_a_file_whose_name_looks_like_a_pattern_or_a_list_is_that_file(folder):
    for name in ("a[1].jsonl", "a,b.jsonl"):
        assert record_files(write(folder / name, [TEXT])) == [folder / name]


def test_a_pattern_without_a_match_and_an_empty_shard_are_named(folder):
    with pytest.raises(NanoVLMError, match="none-[*].jsonl: no file matches this pattern"):
        read_records(folder / "none-*.jsonl")
    write(folder / "a.jsonl", [TEXT])
    (folder / "b.jsonl").touch()
    with pytest.raises(NanoVLMError, match="b.jsonl: holds no records"):
        read_records(folder / "*.jsonl")
    with pytest.raises(NanoVLMError, match="c.jsonl: cannot be read"):
        read_records(f"{folder}/a.jsonl,{folder}/c.jsonl")


def test_unusable_records_count_against_all_files(folder):
    write(folder / "a.jsonl", [TEXT] * 99)
    write(folder / "b.jsonl", [TEXT, TEXT, {}, {}])
    write(folder / "c.jsonl", [TEXT] * 98)
    assert len(read_records(folder / "*.jsonl")[1]) == 2
    with pytest.raises(NanoVLMError, match="2 of 4 records"):
        read_records(folder / "b.jsonl")


def test_images_in_tar_files(folder):
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name, kind in (("a.jpg", tarfile.REGTYPE), ("link.jpg", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.jpg"
            tar.addfile(member, io.BytesIO())
    records, _ = read_records(write(folder / "data.jsonl", [LLAVA | {"image": "x.tar::a.jpg"}]))
    assert records[0].images == (folder / "x.tar::a.jpg",)
    for name, reason in (
        ("x.tar::b.jpg", "the archive has no such member"),
        ("x.tar::link.jpg", "is a link"),
        ("y.tar::a.jpg", "the archive cannot be read"),
    ):
        with pytest.raises(NanoVLMError, match=f"^here: image {folder / name} {reason}"):
            parse_record(LLAVA | {"image": name}, "here", folder)


def test_a_record_that_is_not_utf_8_is_skipped_and_named(folder):
    good = json.dumps(TEXT).encode()
    bad = '{"id": "é", "messages": []}'.encode("latin-1")
    (folder / "data.jsonl").write_bytes(b"\n".join([good] * 50 + [bad] + [good] * 50))
    (folder / "data.json").write_bytes(b"[" + b",".join([good] * 50 + [bad] + [good] * 50) + b"]")
    for name, where in (("data.jsonl", ":51"), ("data.json", ": record 51")):
        records, skipped = read_records(folder / name)
        reason = "is not UTF-8 text; save the file as UTF-8"
        assert len(records) == 100 and skipped == [f"{folder / name}{where}: {reason}"]


def test_lines_of_json_are_read_whatever_the_name_of_the_file(folder):
    for name in ("data.json", "data.txt"):
        text = "\n".join(json.dumps(entry) for entry in ALL)
        (folder / name).write_text(text)
        assert [record.where for record in read_records(folder / name)[0]] == [
            f"{folder / name}:{number}" for number in (1, 2, 3, 4)
        ]


def test_a_list_over_several_lines_is_read_whatever_the_name_of_the_file(folder):
    for name in ("data.json", "data.jsonl"):
        (folder / name).write_text(json.dumps(ALL, indent=1))
        assert len(read_records(folder / name)[0]) == 4


def test_a_line_without_end_is_skipped_without_holding_it(folder, monkeypatch):
    monkeypatch.setattr(records_module, "MAX_LINE", 2**12)
    long = json.dumps(TEXT | {"id": "x" * 3 * 2**12})
    path = write(folder / "data.jsonl", [TEXT] * 50 + [long] + [TEXT] * 49)
    records, skipped = read_records(path)
    assert len(records) == 99 and skipped == [f"{path}:51: is a line of more than 0 MiB"]


def test_what_is_no_regular_file_is_not_waited_for(folder):
    os.mkfifo(folder / "pipe.jsonl")
    with pytest.raises(NanoVLMError, match="pipe.jsonl: is a pipe"):
        read_records(folder / "pipe.jsonl")
    os.mkfifo(folder / "pipe.jpg")
    with pytest.raises(NanoVLMError, match="pipe.jpg is a folder, a pipe"):
        parse_record(LLAVA | {"image": "pipe.jpg"}, "here", folder)


def test_skipped_records_are_named_up_to_fifty_and_counted(capsys):
    say_skipped([f"reason {number}" for number in range(60)], 6000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 51 and lines[49] == "skipped: reason 49"
    assert lines[50] == (
        f"skipped: 60 of 6000 records, the first 50 of them named above; {see('skipped-records')}"
    )
    say_skipped([], 7)
    assert capsys.readouterr().err == ""


def test_a_record_can_be_written_and_read_again(folder):
    entry = MESSAGES | {"id": 3}
    entry["messages"] = [*entry["messages"], {"role": "user", "content": "And?"}]
    entry["messages"] += [{"role": "assistant", "content": "b", "loss": False}]
    for written in (entry, LLAVA, TEXT, QUESTION):
        record = parse_record(written, "here", folder)
        names = [image.name for image in record.images]
        assert parse_record(record.to_entry(names), "here", folder) == record


def test_records_with_images_that_cannot_be_opened(folder):
    Image.new("RGB", (4, 4)).save(folder / "b.jpg")
    good, bad = LLAVA | {"image": "b.jpg"}, LLAVA
    records = [parse_record(entry, f"{n}", folder) for n, entry in enumerate([good, bad, TEXT])]
    usable, skipped = check_images(records)
    assert usable == [records[0], records[2]]
    assert len(skipped) == 1 and skipped[0].startswith(f"1: {folder / 'a.jpg'}: not an image")


def test_a_folder_is_told_what_to_give(tmp_path):
    with pytest.raises(NanoVLMError, match=r"is a folder; give a file of records; `python"):
        read_records(tmp_path)
    (tmp_path / "records.jsonl").write_text("{}\n")
    with pytest.raises(NanoVLMError, match=r"is a folder; give its records, .*records\.jsonl$"):
        read_records(tmp_path)
