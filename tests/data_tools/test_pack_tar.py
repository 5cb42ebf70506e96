"""Records and images as shards: the same records and images can be read from them."""

import base64
import json
import tarfile
from pathlib import Path

import pytest

from data_tools import pack_tar
from data_tools.pack_tar import pack
from nanovlm.data.batches import Batches, BatchOptions, RecordEncoder
from nanovlm.data.records import read_records
from nanovlm.errors import NanoVLMError
from nanovlm.hub.models import load_model
from nanovlm.inputs import archive
from tests.data.test_batches import assert_same

TEXT = {
    "id": 3,
    "messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "hi"}],
}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name in ("a.jpg", "sub/红.jpg", "c.jpg"):
        (tmp_path / "in" / name).write_bytes(name.encode())
    return tmp_path


def show(*names: str, **keys) -> dict:
    image = {"images": list(names)} if len(names) > 1 else {"image": names[0]}
    question = {"from": "human", "value": "<image>" * len(names)}
    return {**keys, **image, "conversations": [question, {"from": "gpt", "value": "yes"}]}


def write(folder: Path, entries: list[dict]) -> str:
    path = folder / "in" / "data.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def test_shards_hold_each_image_once_and_records_unchanged(folder):
    entries = [
        show("a.jpg", id=1, kind="x"),
        TEXT,
        show("sub/红.jpg", "a.jpg"),
        show("c.jpg"),
        show("a.jpg"),
        TEXT,
    ]
    out = folder / "shards"
    assert pack(write(folder, entries), None, out, size=2) == 2
    expected = [
        [
            show("shard-00000.tar::a.jpg", id=1, kind="x"),
            TEXT,
            show("shard-00000.tar::sub/红.jpg", "shard-00000.tar::a.jpg"),
        ],
        [show("shard-00001.tar::c.jpg"), show("shard-00000.tar::a.jpg"), TEXT],
    ]
    assert [lines(out / f"shard-0000{number}.jsonl") for number in range(2)] == expected
    with tarfile.open(out / "shard-00000.tar") as tar:
        assert tar.getnames() == ["a.jpg", "sub/红.jpg"]
        assert tar.extractfile("sub/红.jpg").read() == "sub/红.jpg".encode()
        assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "")}
    records, skipped = read_records(out / "shard-*.jsonl")
    assert len(records) == 6 and skipped == []


def test_images_named_within_the_turns_and_in_the_record_itself_are_packed(folder):
    answer = {"role": "assistant", "content": "yes", "loss": True}
    parts = [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "?"}]
    uri = "data:image/png;base64," + base64.b64encode(b"c.jpg").decode()
    entries = [
        {"id": 1, "messages": [{"role": "user", "content": parts}, answer]},
        {"query": "Which? <img>sub\\红.jpg</img>", "response": "yes", "images": None},
        {"images": [{"path": "a.jpg"}], "texts": [{"user": "?", "assistant": "yes"}]},
        show("a.jpg", images=None),
        show(uri),
    ]
    data = write(folder, entries)
    pack(data, None, folder / "out", size=9)
    before, after = read_records(data)[0], read_records(folder / "out" / "shard-00000.jsonl")[0]
    assert [record.messages for record in after] == [record.messages for record in before]
    assert [archive.read_member(record.images[0]) for record in after] == [
        name.encode() for name in ("a.jpg", "sub/红.jpg", "a.jpg", "a.jpg", "c.jpg")
    ]
    assert lines(folder / "out" / "shard-00000.jsonl")[3] == show(
        "shard-00000.tar::a.jpg", images=None
    )


def test_shards_can_be_packed_again(folder):
    (folder / "two").mkdir()
    names = ["a.jpg", "sub/红.jpg", "c.jpg"]
    pack(write(folder, [show(name) for name in names]), None, folder / "one", size=1)
    assert pack(str(folder / "one" / "*.jsonl"), None, folder / "two", size=9) == 1
    with tarfile.open(folder / "two" / "shard-00000.tar") as tar:
        assert [tar.extractfile(member).read().decode() for member in tar] == names


def test_the_same_batches_come_from_a_folder_and_from_tar_files(tiny, tmp_path):
    assert pack(str(tiny.data / "train.jsonl"), None, tmp_path, size=5) > 2  # an empty folder
    model = load_model(tiny.model)
    options = BatchOptions(batch_size=8, share=4, max_length=200, pack=256, bucket=2)
    batches = [
        Batches(read_records(data)[0], RecordEncoder.of(model), options)
        for data in (tiny.data / "train.jsonl", tmp_path / "*.jsonl")
    ]
    for number in range(8):
        folder, tar = (part[number] for part in batches)
        folder.records, tar.records = [], []  # their names differ
        assert folder.images and tar.images
        assert_same(folder, tar)


def test_nothing_is_written_of_records_that_cannot_be_used(folder):
    with pytest.raises(NanoVLMError, match="2 of 3 records cannot be used"):
        pack(
            write(folder, [show("a.jpg"), show("none.jpg"), show("none.jpg")]),
            None,
            folder / "out",
            size=2,
        )
    assert [path.name for path in folder.iterdir()] == ["in"]


def test_a_few_bad_records_are_left_out_and_named(folder, capsys):
    entries = [show("a.jpg")] * 50 + [show("none.jpg")] + [show("a.jpg")] * 50
    pack(write(folder, entries), None, folder / "out", size=2)
    assert len(lines(folder / "out" / "shard-00000.jsonl")) == 100
    assert "data.jsonl:51: image" in capsys.readouterr().err


def test_paths_outside_the_folder_or_of_two_files_are_refused(folder):
    (folder / "b.jpg").touch()
    for name in ("../b.jpg", str(folder / "b.jpg")):
        with pytest.raises(NanoVLMError, match="leads out of the images' folder"):
            pack(write(folder, [show("a.jpg"), show(name)]), None, folder / "out", size=1)
    (folder / "one").mkdir()
    (folder / "one" / "a.jpg").touch()
    (folder / "one" / "data.jsonl").write_text(json.dumps(show("a.jpg")) + "\n")
    data = f"{write(folder, [show('a.jpg')])},{folder / 'one' / 'data.jsonl'}"
    with pytest.raises(NanoVLMError, match="another file is a.jpg in shard-00000.tar"):
        pack(data, None, folder / "out", size=2)
    assert not list(folder.rglob("*shard-*")) and not (folder / "out").exists()
    assert pack(data, None, folder / "out", size=1) == 2  # each in a tar file of its own


def test_the_command(folder, call):
    data = write(folder, [show("a.jpg"), show("c.jpg")])
    done = call(pack_tar.main, "--data", data, "--out", folder / "shards", "--size", "1")
    assert done.returncode == 0 and "shards: 2 shards" in done.stderr
    again = call(pack_tar.main, "--data", data, "--out", folder / "shards")
    assert again.returncode == 2
    assert again.stderr.startswith(f"error: {folder / 'shards'}: holds shard-00000.jsonl already")
    taken = call(pack_tar.main, "--data", data, "--out", folder / "in")
    assert taken.returncode == 2 and f"{folder / 'in'}: holds a.jpg already" in taken.stderr
