"""Every published form is recognised, converted, counted and read back."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools.convert.__main__ import Task, convert
from data_tools.convert.recognise import FORMS, recognise
from nanovlm.data.preferences import read_pairs
from nanovlm.data.records import check_images, read_records
from nanovlm.errors import NanoVLMError
from nanovlm.training.run import run_stage
from tests.data_tools.convert import published

pytest.importorskip("pyarrow")
MISSING, BROKEN = "image missing", "image that cannot be read"
MARKERS, EMPTY = "image markers that do not match the images", "no answer or no text"

# What writes it: its form, records in and out, the first record's answer, and what is skipped.
CASES: dict[Callable[[Path], None], tuple[str, int, int, str, dict[str, int]]] = {
    published.llava_folder: ("turns", 6, 4, "第 0 个物体。", {MISSING: 1, BROKEN: 1}),
    published.cc3m_zip: ("turns", 6, 5, "第 0 个物体。", {MISSING: 1}),
    published.allava: ("turns", 6, 5, "第 0 个物体。", {MISSING: 1}),
    published.chinese_llava: ("turns", 6, 5, "第 0 个物体。", {MISSING: 1}),
    published.svlm_data: ("turns", 6, 5, "猫", {MISSING: 1}),
    published.the_cauldron: ("turns", 6, 5, "Red.", {BROKEN: 1}),
    published.fine_vision: ("turns", 6, 5, "0 shapes.", {EMPTY: 1}),
    published.minimind: ("turns", 6, 5, "好的。", {MARKERS: 1}),
    published.rlhf_v: ("pairs", 6, 5, "A dog 0.", {"pair that cannot be used": 1}),
    published.rlaif_v: ("pairs", 6, 5, "Here.", {EMPTY: 1}),
    published.ai_challenger: ("captions", 6, 4, "两个男人在跑步。", {MISSING: 2}),
    published.coco: ("coco", 6, 5, "A man riding a bike.", {MISSING: 1}),
    published.karpathy: ("karpathy", 8, 6, "A dog runs.", {MISSING: 2}),
    published.flickr8k_cn: ("caption-lines", 6, 4, "一只狗在跑。", {MISSING: 2}),
    published.flickr8k_csv: ("captions", 6, 5, "A child, in pink, is climbing.", {MISSING: 1}),
    published.coco_cn: ("caption-lines", 6, 5, "一个男人。", {MISSING: 1}),
    published.basic_vlm: ("basic-vlm", 6, 4, "两只猫。", {MISSING: 1, EMPTY: 1}),
    published.llama_factory: ("llama-factory", 6, 4, "A cat.", {MISSING: 1, EMPTY: 1}),
    published.ms_swift: ("turns", 6, 4, "猫", {MARKERS: 1, "keys that are not read": 1}),
    published.ms_swift_dpo: ("pairs", 6, 5, "猫", {"pair that cannot be used": 1}),
    published.openai: ("turns", 6, 5, "A cat.", {"image on the web": 1}),
    published.share_gpt: ("turns", 6, 4, "A cat.", {EMPTY: 1, "turns of another role": 1}),
    published.csv: ("turns", 6, 5, "A thing; 0", {"damaged": 1}),
    published.tsv: ("captions", 6, 5, "一只猫。", {MISSING: 1}),
    published.folder_of_texts: ("folder", 6, 4, "A cat, sleeping.", {MISSING: 1, EMPTY: 1}),
    published.webdataset: ("webdataset", 6, 5, "一张图 0", {BROKEN: 1}),
}  # fmt: skip
NAMES = [case.__name__ for case in CASES]


@pytest.mark.parametrize("shards", [False, True], ids=["files", "shards"])
@pytest.mark.parametrize("make", CASES, ids=NAMES)
def test_a_published_form_becomes_records(tmp_path, make, shards: bool):
    make(tmp_path / "source")
    form, records_in, records_out, answer, skipped = CASES[make]
    out = tmp_path / "out"
    report = convert(Task(tmp_path / "source", out, shards=shards))
    written = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert written["form"] == form
    assert (report.records_in, report.records_out) == (records_in, records_out)
    assert {name: entry["count"] for name, entry in report.skipped.items()} == skipped
    assert all(str(tmp_path) in e for entry in report.skipped.values() for e in entry["examples"])

    read = read_pairs if written["holds"] == "pairs" else read_records
    records, unusable = read(out / "records.jsonl")
    assert not unusable and len(records) == records_out
    usable, broken = check_images(records)
    assert not broken and len(usable) == records_out
    assert records[0].messages[-1].text == answer
    assert sum(len(record.images) for record in records) == report.images
    if shards:
        assert all(path.parent == out for record in records for path in record.images)
        assert len(list(out.glob("shard-*.tar"))) == 1 and not (out / "images").exists()
    expected = ["records.jsonl", "report.json"]
    rest = sorted(path.name for path in out.iterdir() if path.name not in expected)
    assert rest in ([], ["images"], ["shard-00000.tar"])


def test_every_form_is_tried():
    assert {form for form, *_ in CASES.values()} == set(FORMS)


def converted(tmp_path: Path, make: Callable[[Path], None], **options) -> list[dict]:
    make(tmp_path / "source")
    convert(Task(tmp_path / "source", tmp_path / "out", **options))
    text = (tmp_path / "out" / "records.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_images_in_files_stay_and_those_of_archives_are_stored_once(tmp_path):
    stay = converted(tmp_path / "a", published.llava_folder)
    assert stay[0]["images"] == ["../source/images/000000000000.jpg"]
    assert not (tmp_path / "a" / "out" / "images").exists()
    stored = converted(tmp_path / "b", published.minimind)
    assert stored[0]["images"] == stored[2]["images"] != stored[1]["images"]
    files = [p for p in (tmp_path / "b" / "out" / "images").rglob("*") if p.is_file()]
    assert len(files) == 2 and {path.suffix for path in files} == {".jpg"}
    assert {path.read_bytes() for path in files} == {published.picture(0), published.picture(1)}
    assert stored[4]["images"] == []  # minimind-v's black image, in place of none


def test_records_keep_their_words_and_identity(tmp_path):
    first = converted(tmp_path, published.llava_folder)[0]
    assert first == {
        "id": "000000000",
        "images": ["../source/images/000000000000.jpg"],
        "messages": [
            {"role": "user", "content": "<image>\n图里有什么？"},
            {"role": "assistant", "content": "第 0 个物体。"},
        ],
    }


def test_a_pair_keeps_its_question_and_both_answers(tmp_path):
    first = converted(tmp_path, published.rlhf_v)[0]
    assert first.keys() == {"images", "messages", "chosen", "rejected"}
    assert first["messages"] == [{"role": "user", "content": "<image>\nWhat is it?"}]
    assert (first["chosen"], first["rejected"]) == ("A dog 0.", "A cat.")


def test_captions_are_asked_for_in_their_language(tmp_path):
    chinese = converted(tmp_path / "a", published.ai_challenger)
    english = converted(tmp_path / "b", published.coco)
    assert chinese[0]["messages"][0]["content"] == "<image>\n用一句话描述这张图片。"
    assert english[0]["messages"][0]["content"] == "<image>\nDescribe this image in one sentence."
    assert [record["messages"][1]["content"] for record in chinese[:2]] == [
        "两个男人在跑步。",
        "有人在路上。",
    ]


def test_what_is_not_for_training_is_left_out_by_name(tmp_path):
    published.coco(tmp_path / "coco")
    left_out = recognise(tmp_path / "coco").left_out
    assert set(left_out) == {
        "annotations/captions_val2017.json", "annotations/instances_train2017.json",
    }  # fmt: skip
    published.flickr8k_cn(tmp_path / "flickr")
    report = convert(Task(tmp_path / "flickr", tmp_path / "out"))
    assert report.passed_over == {"captions of photos that are not listed for training": 2}
    val = recognise(tmp_path / "coco" / "annotations" / "captions_val2017.json")
    assert val.form == "coco"


def test_of_several_forms_the_conversations_count(tmp_path):
    published.cc3m_zip(tmp_path)
    source = recognise(tmp_path)
    assert source.files == [tmp_path / "chat.json"]
    assert source.left_out == {"metadata.json": "is of another form: --as captions converts it"}
    assert recognise(tmp_path, "captions").files == [tmp_path / "metadata.json"]


def test_images_elsewhere_are_found_by_the_end_of_their_path(tmp_path):
    rows = [published.llava(n, f"coco/train2017/{n}.jpg") for n in range(3)]
    published.put(tmp_path / "a" / "chat.json", rows)
    published.put_images(tmp_path / "coco", ["train2017/0.jpg", "val2017/1.jpg", "train2017/2.jpg"])
    report = convert(Task(tmp_path / "a", tmp_path / "out", images=tmp_path / "coco"))
    assert report.records_out == 2  # val2017/1.jpg is another image
    published.put_zip(
        tmp_path / "t.zip", {f"train2017/{n}.jpg": published.picture(n) for n in range(3)}
    )
    report = convert(Task(tmp_path / "a", tmp_path / "zip", images=tmp_path / "t.zip"))
    assert report.records_out == 3
    names = [f"train2014/COCO_train2014_{7:012}.jpg", f"train2017/{7:012}.jpg"]
    published.put_images(tmp_path / "both", names)  # the same photo, under both of its names
    published.put(tmp_path / "b" / "chat.json", [published.llava(7)])
    convert(Task(tmp_path / "b", tmp_path / "one", images=tmp_path / "both"))
    (line,) = (tmp_path / "one" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["images"] == [f"../both/{names[1]}"]


def test_an_image_that_several_have_is_not_guessed(tmp_path):
    published.put(
        tmp_path / "s" / "chat.json", [published.llava(0, "0.jpg"), published.llava(1, "1.jpg")]
    )
    published.put_images(tmp_path / "s", ["a/0.jpg", "b/0.jpg", "b/1.jpg"])
    report = convert(Task(tmp_path / "s", tmp_path / "out"))
    (example,) = report.skipped["image name that several have"]["examples"]
    assert "image '0.jpg' may be any of 2: a/0.jpg, b/0.jpg" in example


def test_the_form_can_be_named_and_a_wrong_one_is_refused(tmp_path):
    published.llava_folder(tmp_path / "a")
    published.put_images(tmp_path / "a" / "pairs", ["0.jpg"])
    file = tmp_path / "a" / "llava_instruct.json"
    assert recognise(file, "turns").form == "turns"
    with pytest.raises(
        NanoVLMError, match="looks like turns .JSON with id, image, conversations.*not coco"
    ):
        recognise(file, "coco")
    with pytest.raises(NanoVLMError, match="a: looks like 1 × turns, not webdataset"):
        recognise(tmp_path / "a", "webdataset")
    with pytest.raises(NanoVLMError, match="no images with texts of the same name"):
        recognise(tmp_path / "a", "folder")


def test_a_limit_counts_the_records_written(tmp_path):
    lines = converted(tmp_path, published.ai_challenger, limit=3)
    assert len(lines) == 3


def test_what_was_converted_trains(tmp_path, tiny):
    published.the_cauldron(tmp_path / "source")
    convert(Task(tmp_path / "source", tmp_path / "out", shards=True))
    records = str(tmp_path / "out" / "records.jsonl")
    run_stage(tiny.settings(tmp_path / "run", data=records, val=records, batch_size=2))
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_a_file_of_llama_factory_is_read_as_its_folder_says(tmp_path):
    published.llama_factory(tmp_path)
    source = recognise(tmp_path / "dpo.json")
    assert (source.form, source.kind) == ("llama-factory", "pairs")
    assert recognise(tmp_path).left_out == {
        "elsewhere": "has no file in this folder (file_name)",
        "dpo.json": "holds pairs: convert it by itself",
    }
