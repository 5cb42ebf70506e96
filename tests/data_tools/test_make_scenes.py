"""The toy world: same seed, same bytes; held-out pairs do not leak; every answer is right."""

import hashlib
import json
import re
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from data_tools import make_scenes as module
from data_tools.make_scenes import make_scenes
from data_tools.scenes_text import KINDS, describe, parse_description, questions
from data_tools.scenes_world import HELD_OUT_PAIRS, RGB, TRAIN_PAIRS, Scene, draw, random_scene
from nanovlm.errors import NanoVLMError
from nanovlm.utils.files import read_jsonl

# Written out again, so that the tests do not read the records with the tables that wrote them.
COLOURS = {
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "blue": "蓝色",
    "purple": "紫色",
    "white": "白色",
    "black": "黑色",
}
SHAPES = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "star": "五角星",
    "diamond": "菱形",
    "ring": "圆环",
    "cross": "十字形",
    "heart": "心形",
}
OUTERMOST = (  # the word, the axis, whether the largest coordinate is meant
    *(("最左", "x", False), ("最右", "x", True), ("最上", "y", False), ("最下", "y", True)),
    *(("leftmost", "x", False), ("rightmost", "x", True)),
    *(("topmost", "y", False), ("bottommost", "y", True)),
)
ENGLISH = {chinese: english for table in (COLOURS, SHAPES) for english, chinese in table.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("world") / "scenes"
    return make_scenes(out, scenes=400, eval_scenes=100, seed=7, workers=1)


@pytest.fixture(scope="module")
def records(folder) -> dict[str, list[dict]]:
    return {split: read_jsonl(folder / f"{split}.jsonl") for split in ("train", "val", "novel")}


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def _turns(record: dict) -> tuple[str, str]:
    user, assistant = record["messages"]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    assert user["content"].startswith("<image>\n")
    return user["content"].removeprefix("<image>\n"), assistant["content"]


def _pairs_named(text: str) -> set[tuple[str, str]]:
    """(colour, shape) wherever the two stand side by side, in English names."""
    english = (rf"\b{name}\b" for name in (*COLOURS, *SHAPES))
    names = "|".join([*COLOURS.values(), *SHAPES.values(), *english])
    words = re.finditer(names, text.lower())
    found = [(word.span(), ENGLISH.get(word[0], word[0])) for word in words]
    return {
        (one, other)
        for ((_, end), one), ((start, _), other) in pairwise(found)
        if start - end <= 1 and one in COLOURS and other in SHAPES
    }


def test_the_same_seed_gives_the_same_bytes_however_many_workers(tmp_path, folder):
    other = make_scenes(tmp_path / "scenes", scenes=400, eval_scenes=100, seed=7, workers=2)
    assert _digests(other) == _digests(folder)
    assert len(_digests(folder)) == 600 + 4


def test_another_seed_gives_other_scenes(tmp_path, folder):
    other = make_scenes(tmp_path / "scenes", scenes=1, eval_scenes=1, seed=8, workers=1)
    name = "images/train/000000.png"
    assert (other / name).read_bytes() != (folder / name).read_bytes()


def test_files_are_complete_and_images_are_64_pixels(folder, records):
    for split, count in (("train", 400), ("val", 100), ("novel", 100)):
        assert {record["image"] for record in records[split]} == {
            f"images/{split}/{i:06d}.png" for i in range(count)
        }
        assert len({record["id"] for record in records[split]}) == len(records[split])
    with Image.open(folder / "images/val/000012.png") as image:
        assert (image.size, image.mode) == ((64, 64), "RGB")
    world = json.loads((folder / "world.json").read_text(encoding="utf-8"))
    assert world["seed"] == 7
    assert sum(world["questions"]["val"].values()) == len(records["val"])


def test_no_two_scenes_look_the_same(folder):
    images = [Image.open(path).tobytes() for path in sorted((folder / "images").rglob("*.png"))]
    assert len(set(images)) == len(images) == 600


def test_a_repeated_scene_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "draw", lambda scene: Image.new("RGB", (64, 64)))
    with pytest.raises(NanoVLMError, match="look the same"):
        make_scenes(tmp_path / "scenes", scenes=1, eval_scenes=1, workers=1)
    assert list(tmp_path.iterdir()) == []


def test_held_out_pairs_use_each_colour_and_each_shape_once():
    assert sorted(colour for colour, _ in HELD_OUT_PAIRS) == sorted(COLOURS)
    assert sorted(shape for _, shape in HELD_OUT_PAIRS) == sorted(SHAPES)
    assert len(TRAIN_PAIRS) == 56 and not set(TRAIN_PAIRS) & set(HELD_OUT_PAIRS)


def test_held_out_pairs_are_neither_shown_nor_named_before_novel(records):
    for question in ("图里有红色五角星吗？", "Is there a red star?"):
        assert _pairs_named(question) == {("red", "star")}
    for split in ("train", "val"):
        for record in records[split]:
            assert not _pairs_named(" ".join(_turns(record))) & set(HELD_OUT_PAIRS), record
            shown = {(thing["colour"], thing["shape"]) for thing in record.get("objects", ())}
            assert not shown & set(HELD_OUT_PAIRS), record
    for record in records["novel"]:
        shown = {(thing["colour"], thing["shape"]) for thing in record.get("objects", ())}
        assert shown <= set(HELD_OUT_PAIRS)
    for split, pairs in (("train", TRAIN_PAIRS), ("novel", HELD_OUT_PAIRS)):
        answers = [_turns(record)[1] for record in records[split]]
        assert {pair for answer in answers for pair in _pairs_named(answer)} == set(pairs)


def _objects(records: list[dict]) -> dict[str, list[dict]]:
    return {record["image"]: record["objects"] for record in records if "objects" in record}


def _outermost(question: str, objects: list[dict]) -> dict | None:
    """The object that 最左边的… or the topmost … means, by a margin of at least 6 pixels."""
    for word, axis, last in OUTERMOST:
        if word in question:
            ranked = sorted(objects, key=lambda thing: thing[axis], reverse=last)
            assert abs(ranked[0][axis] - ranked[1][axis]) >= 6
            return ranked[0]
    return None


def _mentions(question: str) -> list[dict[str, str]]:
    """The colours and shapes that the question names, in order, alone or as pairs."""
    if re.search("[一-鿿]", question):
        pattern = f"({'|'.join(COLOURS.values())})?({'|'.join(SHAPES.values())}|的物体)"
    else:
        pattern = rf"(?:({'|'.join(COLOURS)}) )?\b({'|'.join(SHAPES)}|object)\b"
    named = [(ENGLISH.get(a, a), ENGLISH.get(b, b)) for a, b in re.findall(pattern, question)]
    named = [{"colour": a, "shape": b if b in SHAPES else ""} for a, b in named]
    return [{key: value for key, value in mention.items() if value} for mention in named]


def _matching(mention: dict[str, str], objects: list[dict]) -> list[dict]:
    return [thing for thing in objects if mention.items() <= thing.items()]


def _expected(kind: str, question: str, objects: list[dict]) -> str:
    """The answer worked out from the objects, independently of the code that wrote it."""
    chinese = re.search("[一-鿿]", question) is not None
    mentions = _mentions(question)
    if kind == "count":
        numbers = (
            ("一个。", "两个。", "三个。", "四个。")
            if chinese
            else ("One.", "Two.", "Three.", "Four.")
        )
        return numbers[len(objects) - 1]
    if kind == "exists":
        there = bool(_matching(mentions[0], objects))
        return ("有。" if there else "没有。") if chinese else ("Yes." if there else "No.")
    if kind in ("what", "colour", "shape"):
        thing = _outermost(question, objects)
        if thing is None:
            [thing] = _matching(mentions[0], objects) if kind != "what" else objects
        if kind == "what":
            if chinese:
                return COLOURS[thing["colour"]] + SHAPES[thing["shape"]] + "。"
            article = "An" if thing["colour"] == "orange" else "A"
            return f"{article} {thing['colour']} {thing['shape']}."
        word = thing[kind]
        return (COLOURS | SHAPES)[word] + "。" if chinese else word.capitalize() + "."
    [first], [second] = (_matching(mention, objects) for mention in mentions)
    return _expected_comparison(kind, question, chinese, first, second)


def _expected_comparison(kind: str, question: str, chinese: bool, first: dict, second: dict) -> str:
    if kind == "larger_smaller":
        assert first["size"] != second["size"]
        holds = first["size"] == "big"
    else:
        axis = "x" if kind == "left_right" else "y"
        assert abs(first[axis] - second[axis]) >= 6
        holds = first[axis] < second[axis]
    yes, no = {
        "left_right": ("左边|left", "右边|right"),
        "above_below": ("上面|above", "下面|below"),
        "larger_smaller": ("大|larger", "小|smaller"),
    }[kind]
    asks_yes, asks_no = re.search(yes, question), re.search(no, question)
    if asks_yes and asks_no:
        word = (yes if holds else no).split("|")[not chinese]
        return word + "。" if chinese else word.capitalize() + "."
    true = holds == bool(asks_yes)
    if "哪个" in question or "Which" in question:
        thing = first if true else second
        if chinese:
            return COLOURS[thing["colour"]] + SHAPES[thing["shape"]] + "。"
        return f"The {thing['colour']} {thing['shape']}."
    return ("是。" if true else "不是。") if chinese else ("Yes." if true else "No.")


@pytest.mark.parametrize("split", ["train", "val", "novel"])
def test_every_answer_is_the_one_the_objects_give(records, split):
    objects, seen = _objects(records[split]), Counter()
    for record in records[split]:
        question, answer = _turns(record)
        seen[record["kind"]] += 1
        if record["kind"] == "describe":
            things = record["objects"]
            there = Counter((thing["size"], thing["colour"], thing["shape"]) for thing in things)
            assert parse_description(answer) == there
            scripts = [re.search(script, question + answer) for script in ("[一-鿿]", "[A-Za-z]")]
            assert None in scripts
        else:
            expected = _expected(record["kind"], question, objects[record["image"]])
            assert answer == expected, question
    assert set(seen) == set(KINDS)


def test_descriptions_go_from_left_to_right(records):
    for objects in _objects(records["train"]).values():
        assert all(right["x"] - left["x"] >= 6 for left, right in pairwise(objects))
        assert len({(thing["colour"], thing["shape"]) for thing in objects}) == len(objects)


def test_one_question_has_one_answer(records):
    answers = defaultdict(set)
    for split in records:
        for record in records[split]:
            question, answer = _turns(record)
            answers[record["image"], question].add(answer)
    assert max(len(given) for given in answers.values()) == 1


def test_a_guess_without_the_image_is_rarely_right(records):
    rates = module.blind_rates(records["train"] + records["val"])
    limits = {"describe": 0.1, "what": 0.15, "colour": 0.3, "shape": 0.3, "count": 0.4}
    for kind, rate in rates.items():
        # For the others, chance is 0.5, give or take the noise of a few hundred questions.
        assert rate <= limits.get(kind, 0.66), (kind, rate)


def test_blind_rates_show_a_biased_world():
    def record(question: str, answer: str) -> dict:
        messages = [{"content": f"<image>\n{question}"}, {"content": answer}]
        return {"kind": "left_right", "messages": messages}

    first_is_right = [
        record("红色圆形和蓝色圆环，哪个更靠左边？", "红色圆形。"),
        record("白色心形和红色圆形，哪个更靠左边？", "白色心形。"),
        record("Which is larger, the red ring or the blue heart?", "The red ring."),
    ]
    assert module.blind_rates(first_is_right) == {"left_right": 1.0}
    question = "Is the red ring to the left of the blue heart?"
    yes_and_no = [record(question, answer) for answer in ("Yes.", "No.")]
    assert module.blind_rates(yes_and_no) == {"left_right": 0.5}


def _blobs(scene: Scene) -> list[np.ndarray]:
    """Boolean masks (64, 64) of the connected regions that differ from the empty background."""
    pixels = np.asarray(draw(scene), dtype=int)
    empty = np.asarray(draw(Scene((), scene.background, scene.background_seed)), dtype=int)
    left = np.abs(pixels - empty).max(axis=2) > 0
    blobs = []
    while left.any():
        blob = np.zeros_like(left)
        stack = [tuple(np.argwhere(left)[0])]
        while stack:
            row, column = stack.pop()
            if 0 <= row < 64 and 0 <= column < 64 and left[row, column]:
                left[row, column], blob[row, column] = False, True
                stack += [(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        blobs.append(blob)
    return blobs


def test_the_image_shows_every_object_whole_apart_and_in_its_colour_and_size():
    areas = defaultdict(list)
    for seed in range(150):
        scene = random_scene(Random(seed), TRAIN_PAIRS + HELD_OUT_PAIRS)
        pixels, blobs = np.asarray(draw(scene), dtype=int), _blobs(scene)
        assert len(blobs) == len(scene.objects)
        for blob in blobs:
            assert not (blob[0].any() or blob[-1].any() or blob[:, 0].any() or blob[:, -1].any())
            row, column = np.argwhere(blob).mean(axis=0) + 0.5
            distances = {
                thing: np.hypot(thing.x - column, thing.y - row) for thing in scene.objects
            }
            [thing] = [thing for thing, distance in distances.items() if distance < 2.5]
            colour = np.median(pixels[blob], axis=0)
            assert min(RGB, key=lambda name: np.abs(RGB[name] - colour).sum()) == thing.colour
            areas[thing.shape, thing.size].append(blob.sum())
    for shape in SHAPES:
        assert min(areas[shape, "big"]) > 1.6 * max(areas[shape, "small"])


def test_descriptions_read_back_in_both_languages():
    for seed in range(200):
        scene = random_scene(Random(seed), TRAIN_PAIRS + HELD_OUT_PAIRS)
        there = Counter((thing.size, thing.colour, thing.shape) for thing in scene.objects)
        for language in ("zh", "en"):
            assert parse_description(describe(scene, language)) == there
    swapped = "图中有两个物体，从左到右是：小的蓝色圆环、大的红色圆形。"
    assert parse_description(swapped) == {("big", "red", "circle"): 1, ("small", "blue", "ring"): 1}
    twice = "There are two objects, from left to right: a big red star, a big red star."
    assert parse_description(twice) == {("big", "red", "star"): 2}


@pytest.mark.parametrize(
    "text",
    [
        *("", "。", "红色圆形。", "图中有", "\n\0�<|im_end|>"),
        "图中有两个物体，从左到右是：大的红色圆形。",
        "图中有一个物体：大的红色圆形、小的红色圆形。",
        "图中有一个物体：红色圆形。",
        "图中有一个物体：大的红色圆形",
        "图中有一个物体：大的大的红色圆形。",
        "图中有五个物体：大的红色圆形。",
        "图中有一个物体：大的粉色圆形。",
        "There is one object: a big red circle",
        "There is one object: a red circle.",
        "There are two objects, from left to right: a big red circle.",
        "图中有一个物体：a big red circle.",
        "图中有两个物体，从左到右是：大的红色圆形、、小的红色圆形。",
        "图中有一个物体：大的红色圆形。图中有一个物体：大的红色圆形。",
    ],
)
def test_anything_else_is_not_a_description(text):
    assert parse_description(text) is None


def test_questions_without_an_image_keep_to_one_language():
    rng = Random(3)
    for _ in range(100):
        asked = questions(random_scene(rng), rng, language="en")
        assert asked[0].kind == "describe"
        assert len({question.text for question in asked}) == len(asked) <= 8
        assert all(question.language == "en" and question.text.isascii() for question in asked)


def test_made_twice_is_made_once_and_other_settings_never_overwrite(folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert make_scenes(folder, scenes=400, eval_scenes=100, seed=7) == folder
    assert "already holds" in capsys.readouterr().err
    with pytest.raises(NanoVLMError, match="seed 7 instead of 8.*choose another --out"):
        make_scenes(folder, scenes=400, eval_scenes=100, seed=8)
    with pytest.raises(NanoVLMError, match="scenes 400 instead of 500"):
        make_scenes(folder, scenes=500, eval_scenes=100, seed=7)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_foreign_folders_and_files_are_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    for out, expected in (
        (tmp_path / "photos", "photos: holds cat.jpg already"),
        (tmp_path / "photos" / "cat.jpg", "cat.jpg: is not a folder"),
    ):
        with pytest.raises(NanoVLMError, match=expected):
            make_scenes(out, scenes=1, eval_scenes=1)
    with pytest.raises(NanoVLMError, match="cannot be written"):
        make_scenes(tmp_path / "photos" / "cat.jpg" / "scenes", scenes=1, eval_scenes=1)
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"
    (tmp_path / "empty").mkdir()
    made = make_scenes(tmp_path / "empty", scenes=1, eval_scenes=1, workers=1)
    assert (made / "world.json").is_file()


def test_scenes_with_a_file_missing_are_not_taken_for_complete(tmp_path):
    out = make_scenes(tmp_path / "scenes", scenes=1, eval_scenes=1, workers=1)
    (out / "val.jsonl").unlink()
    with pytest.raises(NanoVLMError, match="lacks val.jsonl"):
        make_scenes(out, scenes=1, eval_scenes=1, workers=1)


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "questions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_scenes(tmp_path / "scenes", scenes=2, eval_scenes=1, workers=1)
    assert list(tmp_path.iterdir()) == []


def test_the_script_runs_from_anywhere_and_complains_in_one_line(tmp_path, command, call):
    small = ("--scenes=200", "--eval-scenes=2", "--workers=2")  # enough to start worker processes
    process = command("data_tools/make_scenes.py", *small, cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out == b"", err.decode()
    assert "blind guess" in err.decode()
    assert len(read_jsonl(tmp_path / "data/scenes/train.jsonl")) > 800
    for wrong in (
        (*small, "--out", tmp_path / "data/scenes", "--seed", "1"),
        ("--scenes", "none"),
        ("--scenes", "0"),
        ("--unknown",),
    ):
        refused = call(module.main, *wrong)
        assert refused.returncode == 2 and refused.stdout == ""
        assert refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1
