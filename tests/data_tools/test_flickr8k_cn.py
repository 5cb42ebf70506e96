"""Records from made-up caption files and photos: written, skipped, refused."""

import io
import json
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from data_tools import caption_questions, flickr8k_cn
from nanovlm.evaluation.things import THINGS

ZH = {"dog": "一只狗在草地上。", "man": "一个男人在骑自行车。", "snow": "雪地里的小屋。"}
EN = {
    "dog": "a dog runs , on the grass .",
    "man": "A man rides a bicycle",
    "snow": "a hut in the snow .",
}
KINDS = list(ZH)


def photo(index: int) -> str:
    return f"{KINDS[index % 3]}_{index}.jpg"


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", **attributes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in attributes.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Twelve photos in a tar, of which nine are named, each with five captions a language."""
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for index in range(12):
            add(archive, f"images/{photo(index)}", f"photo {index}".encode())
    for tag, captions in (("zhc", ZH), ("enc", EN)):
        photos = [(photo(i), captions[KINDS[i % 3]]) for i in range(12)]
        lines = [f"{name}#{tag}#{n} {caption}" for n in range(5) for name, caption in photos]
        (tmp_path / f"{tag}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "train.txt").write_text("".join(f"{photo(i)}\n" for i in range(9)))
    return tmp_path


@pytest.fixture
def convert(call):
    """Run the command on what `source` holds."""

    def completed(
        source: Path, *more: str, images: str = "images.tar", out: str = "out"
    ) -> subprocess.CompletedProcess[str]:
        inputs = ("--images", source / images, "--captions", source / "zhc.txt")
        split = ("--names", source / "train.txt", "--out", source / out)
        return call(flickr8k_cn.main, *inputs, *split, *more)

    return completed


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def assert_refused(result: subprocess.CompletedProcess, words: str) -> None:
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ") and words in last
    assert "Traceback" not in result.stderr


def test_four_flags_give_training_and_evaluation_records(source: Path, convert) -> None:
    result = convert(source)
    assert result.returncode == 0, result.stderr
    out = source / "out"
    assert {path.name for path in out.iterdir()} == {"images", "train.jsonl", "train_zh.jsonl"}
    assert {path.name for path in (out / "images").iterdir()} == {photo(i) for i in range(9)}
    assert (out / "images" / photo(4)).read_bytes() == b"photo 4"
    training, evaluation = read(out / "train.jsonl"), read(out / "train_zh.jsonl")
    assert len(training) == 45 and len(evaluation) == 9
    prompt = {"role": "user", "content": "<image>\n用一句话描述这张图片。"}
    assert training[0] == {
        "id": "dog_0.jpg#zh#0",
        "image": "images/dog_0.jpg",
        "messages": [prompt, {"role": "assistant", "content": "一只狗在草地上。"}],
    }
    assert evaluation[1]["messages"] == [prompt]
    assert evaluation[1]["references"] == ["一个男人在骑自行车。"] * 5
    assert "train.jsonl: 45 records" in result.stderr and "9 photos" in result.stderr


def test_english_adds_mixed_records_and_balanced_questions(source: Path, convert) -> None:
    result = convert(source, "--captions-en", str(source / "enc.txt"), "--split", "small")
    assert result.returncode == 0, result.stderr
    out = source / "out"
    english = read(out / "small_en.jsonl")
    assert english[0]["references"] == ["A dog runs, on the grass."] * 5
    assert english[1]["references"] == ["A man rides a bicycle."] * 5
    questions = read(out / "small_yesno.jsonl")
    # Five captions a photo in each language.
    assert len(read(out / "small_mixed.jsonl")) == 9 * 5 + 9 * 5 + len(questions)

    asked = Counter((q["messages"][0]["content"], q["references"][0]) for q in questions)
    assert ("<image>\n图中有狗吗？", "有。") in asked
    assert ("<image>\nIs there a dog in the image?", "No.") in asked
    opposite = {"有。": "没有。", "没有。": "有。", "Yes.": "No.", "No.": "Yes."}
    for (question, answer), count in asked.items():
        assert asked[question, opposite[answer]] == count
    for question in questions:
        prompt = question["messages"][0]["content"]
        if "狗" in prompt or "dog" in prompt:
            has_dog = question["image"].startswith("images/dog")
            assert question["references"][0] in (("有。", "Yes.") if has_dog else ("没有。", "No."))


def test_the_captions_that_agree_are_chosen(source: Path, convert) -> None:
    """Of five English captions the two most alike, of the Chinese ones the one most alike."""
    captions = {
        "enc": ["a cat", "A dog runs on grass", "He waits", "A dog runs on the grass", "It ran"],
        "zhc": ["狗在跑。", "天气好。", "狗在草地上跑。", "狗在草地上。", "他在等人。"],
    }
    for tag, of_dog in captions.items():
        lines = (source / f"{tag}.txt").read_text(encoding="utf-8").splitlines()
        others = [line for line in lines if not line.startswith(photo(0))]
        others += [f"{photo(0)}#{tag}#{n} {caption}" for n, caption in enumerate(of_dog)]
        (source / f"{tag}.txt").write_text("\n".join(others), encoding="utf-8")
    result = convert(source, "--captions-en", str(source / "enc.txt"))
    assert result.returncode == 0, result.stderr

    records = read(source / "out" / "train_agreed.jsonl")
    answers = {record["id"]: record["messages"][1]["content"] for record in records}
    of_dog = {key: answer for key, answer in answers.items() if key.startswith(photo(0))}
    chosen = {key: answer for key, answer in of_dog.items() if key[-1].isdigit()}
    assert chosen == {
        f"{photo(0)}#en#1": "A dog runs on grass.",
        f"{photo(0)}#en#3": "A dog runs on the grass.",
        f"{photo(0)}#zh#2": "狗在草地上跑。",
    }
    # Captions that score alike, as of the other photos, are taken in their order.
    assert sum(key[-1].isdigit() for key in answers) == 9 * 3
    assert {f"{photo(1)}#en#0", f"{photo(1)}#en#1", f"{photo(1)}#zh#0"} <= set(answers)

    everything = {record["id"] for record in read(source / "out" / "train_mixed.jsonl")}
    questions = Counter(key for key in answers if not key[-1].isdigit())
    assert set(answers) <= everything and 0 < len(questions) < len(everything) - 90
    asked = Counter()  # by the thing asked for: both answers are equally frequent
    for key in questions:
        asked[key.split("#")[2], answers[key] in ("有。", "Yes.")] += 1
    assert all(asked[thing, True] == asked[thing, False] for thing, _ in asked)


def test_photos_of_few_captions_keep_all() -> None:
    captions = {"a.jpg": {0: "One dog", 3: "A dog"}, "b.jpg": {2: "A man"}}
    assert flickr8k_cn.most_agreed(["a.jpg", "b.jpg"], captions, 2) == captions


@pytest.mark.parametrize(
    ("name", "zh", "en", "answer"),
    [
        ("狗", "小狗在跑。", "A puppy runs.", True),
        ("狗", "小狗在跑。", "An animal runs.", None),
        ("狗", "一只动物。", "Something runs.", None),
        ("狗", "一个人在看书。", "A man reads.", False),
        ("男人", "女人在看书。", "A woman reads.", False),
        ("男人", "一个人在看书。", "A person reads.", None),
        ("女人", "男人在看书。", "A man reads.", False),
        ("自行车", "骑手在林中。", "A biker in the woods.", None),
        ("马", "站在马路上。", "He stands on a street.", False),
        ("马", "骑马的人。", "A man on a horse.", True),
        ("球", "拿着气球。", "A child with balloons.", None),
        ("水", "买水果的人。", "Buying fruit.", None),
    ],
)
def test_answers_follow_from_both_languages(
    name: str, zh: str, en: str, answer: bool | None
) -> None:
    (thing,) = (thing for thing in THINGS if thing.zh_name == name)
    assert thing.answer([zh], [en]) is answer


def test_same_bytes_again_and_from_a_folder(source: Path, convert) -> None:
    english = ("--captions-en", str(source / "enc.txt"))
    assert convert(source, *english).returncode == 0
    with tarfile.open(source / "images.tar") as archive:
        archive.extractall(source / "unpacked", filter="data")
    assert convert(source, *english).returncode == 0  # in place: identical files are left alone
    assert convert(source, *english, images="unpacked", out="again").returncode == 0

    def files(out: Path) -> dict[Path, bytes]:
        paths = [path for path in out.rglob("*") if path.is_file()]
        return {path.relative_to(out): path.read_bytes() for path in paths}

    assert files(source / "out") == files(source / "again")
    assert len(files(source / "out")) == 9 + 6


def test_the_script_runs_from_anywhere(source: Path, command) -> None:
    inputs = ("--images", "images.tar", "--captions", "zhc.txt")
    split = ("--names", "train.txt", "--out", "out")
    process = command("data_tools/flickr8k_cn.py", *inputs, *split, cwd=source)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0, errors.decode()
    assert len(read(source / "out" / "train.jsonl")) == 45


def test_other_content_is_never_overwritten(source: Path, convert) -> None:
    (source / "out").mkdir()
    (source / "out" / "train_zh.jsonl").write_text("mine\n")
    assert_refused(convert(source), "train_zh.jsonl: is there already with other content")
    assert (source / "out" / "train_zh.jsonl").read_text() == "mine\n"
    assert not (source / "out" / "train.jsonl").exists()

    (source / "photos" / "images").mkdir(parents=True)
    (source / "photos" / "images" / photo(0)).write_bytes(b"mine")
    assert_refused(convert(source, out="photos"), f"{photo(0)}: is there already")
    assert (source / "photos" / "images" / photo(0)).read_bytes() == b"mine"


def test_hostile_archive_writes_nothing_outside(source: Path, convert) -> None:
    secret = source / "secret.txt"
    secret.write_text("secret")
    with tarfile.open(source / "images.tar", "w") as archive:
        add(archive, f"../../{photo(0)}", b"escaped?")
        add(archive, f"/{photo(1)}", b"absolute?")
        add(archive, "../unasked.jpg", b"unasked")
        add(archive, f"images/{photo(2)}", type=tarfile.SYMTYPE, linkname=str(secret))
        for index in range(3, 9):
            add(archive, f"images/{photo(index)}", b"photo")
    before = set(source.parent.rglob("*"))
    result = convert(source)
    assert_refused(result, f"1 of 9 cannot be used, more than 1% ({photo(2)} is a link")
    written = set(source.parent.rglob("*")) - before
    photos = {photo(i) for i in range(9) if i != 2}
    assert {path.name for path in written if path.is_file()} == photos
    assert all(path.is_relative_to(source / "out") for path in written)


def test_a_few_bad_entries_are_skipped_and_named_and_many_are_an_error(
    source: Path, convert
) -> None:
    names = [f"many_{index}.jpg" for index in range(200)]
    (source / "train.txt").write_text("\n".join(names))
    captions = [f"{name}#zhc#0 一张照片。" for name in names]
    captions.insert(-1, "not a caption")
    (source / "zhc.txt").write_text("\n".join(captions), encoding="utf-8")
    (source / "photos").mkdir()
    for index, name in enumerate(names):
        (source / "photos" / name).write_bytes(b"" if index == 7 else b"photo")
    result = convert(source, images="photos")
    assert result.returncode == 0
    assert "skipped 1 of 201: line 200: 'not a caption'" in result.stderr
    assert "skipped 1 of 200: many_7.jpg is empty" in result.stderr
    assert len(read(source / "out" / "train.jsonl")) == 199

    for name in names[:5]:
        (source / "photos" / name).unlink()
    assert_refused(convert(source, images="photos", out="second"), "6 of 200 cannot be used")
    (source / "zhc.txt").write_text("\n".join(captions[:100]), encoding="utf-8")
    assert_refused(convert(source, images="photos", out="third"), "many_100.jpg has no caption")


def test_broken_input_is_one_line(source: Path, convert) -> None:
    tar = (source / "images.tar").read_bytes()
    (source / "images.tar").write_bytes(tar[:3000])
    assert_refused(convert(source), "images.tar")
    (source / "images.tar").write_bytes(b"not a tar" * 1000)
    assert_refused(convert(source), "is not a whole tar archive")
    (source / "images.tar").unlink()
    assert_refused(convert(source), "images.tar: cannot be read")
    (source / "images.tar").write_bytes(tar)
    english, missing = str(source / "enc.txt"), str(source / "missing.txt")
    assert_refused(convert(source, "--captions", english), "is not 'NAME#zhc#NUMBER caption'")
    assert_refused(convert(source, "--captions", missing), "missing.txt: cannot be read")
    assert_refused(convert(source, out="images.tar"), "cannot be written")
    assert_refused(convert(source, "--split", "../up"), "--split")
    (source / "train.txt").write_text("../../etc/passwd\n")
    assert_refused(convert(source), "is not a plain file name")
    (source / "train.txt").write_text("\n")
    assert_refused(convert(source), "names no photo")
    assert not list(source.rglob("*.jsonl"))


def test_the_share_of_things_that_no_reference_mentions(tmp_path: Path, call) -> None:
    lines = [
        # A man and a skateboard, wrongly.
        {"answer": "一个男人在玩滑板。", "references": ["雪地里的狗。", "A dog in the snow."]},
        {"answer": "一只狗在雪地里。", "references": ["雪地里的狗。"]},
        {"answer": "男人和狗。", "references": ["一个人和一只狗。"]},  # 人 may be a man
        {"answer": "Nothing.", "references": ["雪地里的狗。"]},
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = call(caption_questions.main, tmp_path / "answers.jsonl")
    assert json.loads(done.stdout) == {"chair_i": round(2 / 6, 6), "chair_s": 0.25, "n": 4}
    for text in ("{}\n", "", "[[\n", '{"answer": "a", "references": "狗"}\n', '{"answer": 3}\n'):
        (tmp_path / "answers.jsonl").write_text(text)
        assert "holds no answers" in call(caption_questions.main, tmp_path / "answers.jsonl").stderr
    assert "cannot be read" in call(caption_questions.main, tmp_path / "gone.jsonl").stderr
