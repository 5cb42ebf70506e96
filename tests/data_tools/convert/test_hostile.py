"""Damaged, hostile and unusual sources: read or refused in one line, and never in all memory."""

import json
import os
import struct
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from data_tools.convert import images as images_module
from data_tools.convert.__main__ import Task, convert
from data_tools.convert.recognise import recognise
from nanovlm.data.tables import csv_rows, rows
from nanovlm.errors import NanoVLMError
from nanovlm.inputs import parquet
from nanovlm.utils.console import run_command
from tests.data_tools.convert import published
from tests.data_tools.convert.published import llava, picture, put, put_lines, put_zip

pyarrow = pytest.importorskip("pyarrow")


def source(tmp_path: Path, names: list[str]) -> Path:
    put(tmp_path / "s" / "chat.json", [llava(n, name) for n, name in enumerate(names)])
    return tmp_path / "s"


def test_no_name_in_a_zip_becomes_a_path(tmp_path):
    folder = source(tmp_path, ["../../evil.jpg", "ok.jpg", "/abs/other.jpg", "C:\\win.jpg"])
    names = ["../../evil.jpg", "ok.jpg", "/abs/other.jpg", "C:\\win.jpg"]
    put_zip(folder / "images.zip", {name: picture(n) for n, name in enumerate(names)})
    before = set(tmp_path.rglob("*"))
    out = tmp_path / "deep" / "er" / "out"
    report = convert(Task(folder, out))
    assert report.records_out >= 1
    made = set(tmp_path.rglob("*")) - before
    assert all(out in (p, *p.parents) or p in out.parents for p in made)
    stored = [p.name for p in (out / "images").rglob("*.jpg")]
    assert len(stored) == report.images and all(len(name) == 28 for name in stored)


def test_a_zip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, "MAX_IMAGE", 2**16)
    folder = source(tmp_path, ["bomb.jpg", "ok.jpg", "lies.jpg"])
    with zipfile.ZipFile(folder / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.jpg", bytes(2**24))
        archive.writestr("ok.jpg", picture(1))
        archive.writestr("lies.jpg", bytes(2**20))
    data = bytearray((folder / "images.zip").read_bytes())
    place = data.rindex(b"PK\x01\x02", 0, data.rindex(b"lies.jpg"))
    data[place + 24 : place + 28] = struct.pack("<I", 100)  # the size that its entry states
    (folder / "images.zip").write_bytes(data)
    tracemalloc.start()
    report = convert(Task(folder, tmp_path / "out", threads=1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.records_out == 1 and peak < 2**23
    examples = report.skipped["image that cannot be read"]["examples"]
    assert "images.zip: bomb.jpg': has more than the limit of 65,536 bytes" in examples[0]


def test_encrypted_and_damaged_members_are_skipped_by_name(tmp_path):
    folder = source(tmp_path, ["a.jpg", "b.jpg"])
    put_zip(folder / "images.zip", {"a.jpg": picture(0), "b.jpg": picture(1)})
    data = bytearray((folder / "images.zip").read_bytes())
    data[data.rindex(b"PK\x01\x02", 0, data.rindex(b"a.jpg")) + 8] |= 1  # encrypted
    (folder / "images.zip").write_bytes(data)
    report = convert(Task(folder, tmp_path / "out"))
    (example,) = report.skipped["image that cannot be read"]["examples"]
    assert "images.zip: a.jpg': cannot be unpacked" in example and "encrypted" in example


def test_a_zip_that_is_cut_off_is_named(tmp_path):
    folder = source(tmp_path, ["a.jpg"])
    data = put_zip(folder / "images.zip", {"a.jpg": picture(0)}).read_bytes()
    (folder / "images.zip").write_bytes(data[:-30])
    with pytest.raises(
        NanoVLMError, match="images.zip: is no whole zip archive .*; fetch it again"
    ):
        convert(Task(folder, tmp_path / "out"))


def test_a_parquet_table_that_is_cut_off_is_named(tmp_path):
    published.the_cauldron(tmp_path)
    (path,) = tmp_path.rglob("*.parquet")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(
        NanoVLMError, match="is a damaged or cut off parquet table .*fetch it again"
    ):
        recognise(path)
    path.write_bytes(data[:200] + bytes(300) + data[500:])
    with pytest.raises(NanoVLMError, match="is a damaged or cut off parquet table"):
        list(rows(path))


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("t.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
         "is a Git LFS pointer: `git lfs pull` fetches the file itself; that is none of the forms"),
        ("t.json", b"<!DOCTYPE html><html>", "is an HTML page"),
        ("t.json", b"", "is an empty file: fetch the file again"),
        ("t.zip", b"PK\x03\x04" + bytes(99), "is a zip archive: unpack it first"),
        ("t.tar.gz", b"\x1f\x8b\x08" + bytes(99), "is a gzip file: unpack it first"),
        ("t.csv", "图片,描述\n1.jpg,一只猫\n".encode("gbk"),
         "is text, probably in GBK: save it as UTF-8"),
        ("t.jsonl", '{"image": "猫"}\n'.encode("utf-16"), "is text, in UTF-16"),
        ("t.json", b'[{"a": 1}]', "is JSON with a; that is none of the forms: turns, pairs"),
        ("t.txt", b"some words\nwithout columns\n", "is text; that is none of the forms"),
        ("t.csv", b"name,age\nx,3\n", "is a table with the first line 'name,age'"),
        ("i.json", b'{"images": [{"file_name": "1.jpg"}], "annotations": [{"bbox": []}]}',
         "is COCO annotations of objects"),
    ],
)  # fmt: skip
def test_what_is_no_data_set_is_named(tmp_path, name: str, data: bytes, message: str):
    path = put(tmp_path / name, data)
    with pytest.raises(NanoVLMError) as raised:
        convert(Task(path, tmp_path / "out"))
    assert str(raised.value).startswith(f"{path}: ") and message in str(raised.value)
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


def test_a_folder_of_nothing_says_what_it_holds(tmp_path):
    put(tmp_path / "s" / "t.json", b"<!DOCTYPE html><html>")
    with pytest.raises(NanoVLMError, match=r"s: holds nothing in a known form \(t.json is an HTML"):
        convert(Task(tmp_path / "s", tmp_path / "out"))
    put(tmp_path / "packed" / "d.jsonl.gz", b"\x1f\x8b\x08" + bytes(99))
    with pytest.raises(NanoVLMError, match=r"\(d.jsonl.gz is a gzip file: unpack it first\)"):
        convert(Task(tmp_path / "packed", tmp_path / "out"))
    with pytest.raises(NanoVLMError, match="does not exist; check the path"):
        convert(Task(tmp_path / "none", tmp_path / "out"))


def test_a_line_ends_where_a_text_file_ends_it(tmp_path):
    """Not at the other characters that `str.splitlines` and `codecs` cut at."""
    odd = "a\u2028b\x0bc\x0cd\x1ce\x85f"
    path = put(tmp_path / "t.csv", f"image,caption\r\n1.jpg,{odd}\r\n2.jpg,x\n3.jpg,y\r4.jpg,z\n")
    assert [value["caption"] for _, value in csv_rows(path)] == [odd, "x", "y", "z"]
    lines = put(tmp_path / "token" / "t.txt", f"1.jpg#0\t{odd}\r\n2.jpg#0 {odd}\n")
    found = recognise(lines.parent)
    assert found.form == "caption-lines"
    assert [row.value["caption"] for row in found.read(0)] == [odd, odd]


def test_a_file_that_is_named_as_one_of_llama_factory_is_not_taken_for_it(tmp_path):
    folder = source(tmp_path, ["0.jpg"])
    published.put_images(folder, ["0.jpg"])
    put(folder / "dataset_info.json", {"features": {"image": {}}, "builder_name": "parquet"})
    assert convert(Task(folder, tmp_path / "out")).records_out == 1
    assert convert(Task(folder / "chat.json", tmp_path / "out2")).records_out == 1


def test_images_with_rarer_endings_are_found(tmp_path):
    names = ["a.jfif", "b.JPEG", "c.avif"]
    folder = source(tmp_path, names)
    published.put_images(folder / "deep", names)
    assert convert(Task(folder, tmp_path / "out")).records_out == 3


@pytest.mark.parametrize("name", ["notes.txt", "old.csv", "index"])
def test_a_text_that_cannot_be_read_does_not_stop_the_others(tmp_path, name: str):
    folder = source(tmp_path, ["0.jpg"])
    published.put_images(folder, ["0.jpg"])
    put(folder / name, "caf\xe9, bar\n".encode("latin-1"))
    found = recognise(folder)
    assert found.left_out == {name: "is not UTF-8 text; save it as UTF-8"}
    assert convert(Task(folder, tmp_path / "out")).records_out == 1


def test_csv_with_odd_quoting_line_ends_and_a_byte_order_mark(tmp_path):
    text = '\ufeffImage,Caption\r\n"a,b.jpg","He said ""hi"",\r\nand left"\r\nc.jpg,5" tall\r\n\r\n'
    path = put(tmp_path / "t.csv", text)
    assert [value for _, value in csv_rows(path)] == [
        {"image": "a,b.jpg", "caption": 'He said "hi",\r\nand left'},
        {"image": "c.jpg", "caption": '5" tall'},
    ]
    put(path, 'image,caption\na.jpg,"never closed\n' + "b.jpg,x\n" * 300_000)
    with pytest.raises(NanoVLMError, match="t.csv: cannot be read as a table .*never closed"):
        list(csv_rows(path))
    put(path, b"image,caption\na.jpg,ok\nb.jpg,\xc3\x28\n" + b"c.jpg,x\n" * 2000)
    with pytest.raises(NanoVLMError, match="t.csv: is not UTF-8 text; save it as UTF-8"):
        list(csv_rows(path))
    for sign in "\t|;":
        put(path, f"image{sign}caption\na.jpg{sign}x, y\n")
        assert [value for _, value in csv_rows(path)] == [{"image": "a.jpg", "caption": "x, y"}]


def test_damaged_lines_cost_only_themselves(tmp_path):
    good = json.dumps(llava(0, "0.jpg"))
    put(tmp_path / "s" / "d.jsonl", f'{good}\n{{"image": \n[1]\n{good}\n"text"\n')
    published.put_images(tmp_path / "s", ["0.jpg"])
    report = convert(Task(tmp_path / "s", tmp_path / "out"))
    assert report.records_out == 2 and report.skipped["damaged"]["count"] == 3


def test_none_usable_is_an_error_with_the_reasons_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    folder = source(tmp_path, ["a.jpg", "b.jpg"])
    argv = ["convert", str(folder), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", argv)
    from data_tools.convert.__main__ import main

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    errors = capsys.readouterr().err
    assert ended.value.code == 2 and not (tmp_path / "out").exists()
    assert (
        f"error: {folder}: none of its 2 records can be used\n  skipped: 2 × image miss" in errors
    )


def test_the_last_line_is_the_next_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    published.csv(Path("photos"))
    monkeypatch.setattr("sys.argv", ["convert", "photos", "--out", "my records"])
    from data_tools.convert.__main__ import main

    main()
    last = capsys.readouterr().err.splitlines()[-1]
    records = str(Path("my records/records.jsonl"))
    assert last == f"next:  python -m data_tools.check '{records}' --out 'my records-checked'"


def test_pyarrow_that_is_missing_is_one_line_with_the_command(tmp_path, monkeypatch):
    published.the_cauldron(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(NanoVLMError, match="python -m pip install -r requirements-data.txt"):
        recognise(tmp_path)


def test_a_parquet_table_larger_than_memory_is_read_in_batches(tmp_path):
    """80 MB in groups of 8 MB, of which the one that is read is held; a start in one is found."""
    data = [{"image_bytes": bytes([n % 251]) + n.to_bytes(4) * 50_000} for n in range(400)]
    path = published.put_parquet(tmp_path / "t.parquet", data, group=40)
    del data
    before = pyarrow.total_allocated_bytes()
    held = 0
    for number, row in enumerate(parquet.parquet_rows(path)):
        held = max(held, pyarrow.total_allocated_bytes() - before)
        assert row["image_bytes"][:1] == bytes([number % 251])
    assert number == 399 and held < 30e6
    rest = [row["image_bytes"][0] for row in parquet.parquet_rows(path, 390)]
    assert rest == [n % 251 for n in range(390, 400)]


def test_a_list_larger_than_memory_is_read_item_by_item(tmp_path):
    path = put(tmp_path / "chat.json", [llava(0, note="x" * 20_000)] * 1000)
    tracemalloc.start()
    count = sum(1 for _ in rows(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1000 and peak < path.stat().st_size / 2


def test_links_that_lead_in_a_circle_end(tmp_path):
    folder = source(tmp_path, ["0.jpg"])
    published.put_images(folder / "images", ["0.jpg"])
    (folder / "images" / "loop").symlink_to(folder)
    assert convert(Task(folder, tmp_path / "out")).records_out == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_what_is_no_file_beside_the_images_is_passed_over(tmp_path):
    folder = source(tmp_path, ["a.jpg", "gone.jpg"])
    published.put_images(folder / "deep", ["a.jpg"])
    (folder / "old.lnk").symlink_to("nowhere")
    os.mkfifo(folder / "a.sock")
    report = convert(Task(folder, tmp_path / "out"))
    assert report.records_out == 1 and report.skipped["image missing"]["count"] == 1


def test_lines_of_several_kinds_in_a_folder_are_all_of_one_kind(tmp_path):
    put_lines(tmp_path / "s" / "a.jsonl", [llava(0, "0.jpg")])
    pair = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    put_lines(tmp_path / "s" / "b.jsonl", [pair])
    published.put_images(tmp_path / "s", ["0.jpg"])
    assert recognise(tmp_path / "s").left_out == {
        "b.jsonl": "is of another form: --as pairs converts it"
    }
    assert convert(Task(tmp_path / "s", tmp_path / "out", "pairs")).records_out == 1
