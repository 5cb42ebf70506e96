"""The gallery: verdicts by hand, hostile text as text, nothing loaded, one image at a time."""

import base64
import hashlib
import json
import re
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from nanovlm.data.records import Record, read_records
from nanovlm.evaluation import __main__ as evaluation
from nanovlm.evaluation import gallery
from nanovlm.evaluation.gallery import draw_gallery, judge
from nanovlm.inputs.chat import IMAGE, Message

HOSTILE = "<script>alert(1)</script>\"'&\x1b"


class Page(HTMLParser):
    """A page's elements, and the text of each card."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements, self.cards = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if ("class", "card") in attrs:
            self.cards.append("")

    def handle_data(self, data):
        if self.cards:
            self.cards[-1] += data + "|"


def record(*references: str, where: str = "data.jsonl:1", question: str = "?", **extra) -> Record:
    asked = (Message("user", (IMAGE, question)),)
    return Record(where, (), asked, references, extra)


def test_verdicts_by_hand():
    caption = record("雪地里的狗。", "一只狗在跑。", "A dog in the snow.")
    records = [
        record("Yes."),
        record("Yes."),
        caption,
        caption,
        record("有两个物体：大的圆、小的星。", kind="describe"),
        record("有两个物体：大的圆、小的星。", kind="describe"),
    ]
    answers = ["yes", "No.", "一个男人和一只狗。", "一只狗在跑。",
               "有两个物体：小的星、大的圆。", "有两个物体：大的圆、大的星。"]  # fmt: skip
    verdicts = judge(records, answers)
    assert [each.right for each in verdicts] == [True, False, None, True, True, False]
    absent = [each.absent for each in verdicts]
    assert absent == [(), (), (("a man", "男人"),), (), (), (("大的星", "大的星"),)]
    assert verdicts[3].cider_d > verdicts[2].cider_d > 0
    worst_first = sorted(range(6), key=lambda place: verdicts[place].order)
    assert worst_first[0] == 1 and set(worst_first[-3:]) == {0, 3, 4}


def test_hostile_text_is_text_and_the_page_may_run_its_own_script_alone(tmp_path):
    records = [
        record("x", where=f"/tmp/{HOSTILE}.jsonl:1", question=HOSTILE),
        record(HOSTILE, "一只狗。", where="b"),
    ]
    path = tmp_path / "g.html"
    draw_gallery(path, HOSTILE, list(zip(records, [HOSTILE, "y"])), {"exact": 0.5, HOSTILE: 1})
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert text.count("alert(1)") == text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 6
    assert "\x1b" not in text
    (policy,) = (
        attributes["content"]
        for tag, attributes in page.elements
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    script = text.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'"
    )
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "href"]


@pytest.mark.parametrize("control", ["none", "shuffled"])
def test_the_command_writes_a_page_that_needs_no_other_file(tiny, tmp_path, call, control):
    path = tmp_path / "g.html"
    flags = ("--model", tiny.model, "--data", tiny.data / "val.jsonl", "--device", "cpu")
    flags += ("--max-new-tokens", "2", "--control", control)
    done = call(evaluation.main, *flags, "--gallery", path)
    assert done.returncode == 0 and f"the gallery is in {path}" in done.stderr
    figures = json.loads(done.stdout)
    text = path.read_text(encoding="utf-8")
    page, records = Page(text), read_records(tiny.data / "val.jsonl")[0]
    assert len(page.cards) == figures["n"] == len(records)
    images = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    assert len(images) == len(records)
    assert all(re.fullmatch(r"data:image/jpeg;base64,[\w+/=]+", source) for source in images)
    for each in records:
        (card,) = (card for card in page.cards if f" · {each.where}|" in card)
        assert each.messages[0].text.strip() in card and each.messages[-1].text in card
    assert ("saw another image of the file" in text) == (control == "shuffled")
    before = path.read_bytes()
    for more, expected in (
        (("--gallery", path), "is there already and stays as it is"),
        (("--gallery", tmp_path / "h.html", "--loss"), "leave out --gallery or --loss"),
        (("--gallery", "x", "--answers", "x"), "name one file"),
        (("--gallery", "x", "--answers", Path("x").absolute()), "name one file"),
        (("--gallery", tiny.data / "val.jsonl"), "is read by this command"),
    ):
        refused = call(evaluation.main, *flags, *more)
        assert refused.returncode == 2 and expected in refused.stderr
        assert refused.stderr.count("\n") == 1
    assert path.read_bytes() == before and not (tmp_path / "h.html").exists()


def test_a_page_of_many_photos_is_never_held_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "thumbnail", lambda path, side: "<img>" + "x" * 200_000)
    answered = [
        (Record(f"a:{number}", (Path("a"),), (Message("user", ("?",)),), ("a", "b"), {}), "b")
        for number in range(200)
    ]
    tracemalloc.start()
    draw_gallery(tmp_path / "g.html", "many", answered, {})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "g.html").stat().st_size > 40e6 and peak < 4e6


def test_an_image_that_is_gone_is_said_to_be(tmp_path):
    gone = Record("a:1", (tmp_path / "gone.jpg",), (Message("user", ("?",)),), ("a",), {})
    draw_gallery(tmp_path / "g.html", "gone", [(gone, "")], {})
    assert "An image cannot be read." in (tmp_path / "g.html").read_text(encoding="utf-8")


def test_an_image_a_thousand_times_as_wide_as_high_is_shown(tmp_path):
    Image.new("RGB", (4000, 3)).save(tmp_path / "wide.png")
    wide = Record("a:1", (tmp_path / "wide.png",), (Message("user", ("?",)),), ("a",), {})
    draw_gallery(tmp_path / "g.html", "wide", [(wide, "a")], {})
    assert "data:image/jpeg;base64," in (tmp_path / "g.html").read_text(encoding="utf-8")
