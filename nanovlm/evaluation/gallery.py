"""A page to look at: each record with its images, its answer, and what is wrong with that.

    python -m nanovlm.evaluation … --gallery out.html

The worst answers come first. The page is one file that works offline, in Chinese or English.

Lesson: lessons/source/17_measuring.py.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanovlm.data.records import Record
from nanovlm.evaluation.answers import is_description, is_right, references_of
from nanovlm.evaluation.metrics import cider_d_of_each, tokenize, wrong_items
from nanovlm.evaluation.page import shown, thumbnail, write_page
from nanovlm.evaluation.things import things_named

SIDE = 320  # pixels of an image's longer side
IMAGES_SHOWN = 4  # of a record
REFERENCES_SHOWN = 10

STYLE = """
:root { --right: #1a7f37; --wrong: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --right: #3fb950; --wrong: #f85149; } }
:root[lang=en] span[lang=zh], :root[lang=zh] span[lang=en] { display: none; }
#language { font: inherit; margin-left: auto; }
dl { display: grid; grid-template-columns: fit-content(55%) 1fr; gap: 0.1rem 1rem; margin: 1rem 0; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
fieldset { border: 0; padding: 0; margin: 1rem 0; display: flex; flex-wrap: wrap;
  gap: 0.3rem 1rem; }
.card { order: var(--rank); }
body:has(#best:checked) .card { order: calc(-1 * var(--rank)); }
body:has(#given:checked) .card { order: var(--place); }
.card img:only-of-type { max-width: 100%; max-height: 20rem; display: block; }
.card p { margin: 0.3rem 0; white-space: pre-wrap; } .card ul { margin: 0; padding-left: 1.2rem; }
.card ul, .question { color: var(--faint); } .answer { font-weight: 600; }
.right { color: var(--right); } .wrong { color: var(--wrong); } .absent { color: var(--mark); }
"""
# The language of the browser, until the button changes it.
SCRIPT = """
const root = document.documentElement;
root.lang = navigator.language.startsWith("zh") ? "zh" : "en";
document.getElementById("language").onclick = () => {
  root.lang = root.lang === "zh" ? "en" : "zh";
};
"""
ORDERS = (("worst", "worst first", "最差的在前"), ("best", "best first", "最好的在前"),
          ("given", "as in the file", "按文件顺序"))  # fmt: skip
FIGURES = {
    "exact": ("equal to a reference", "与参考答案相同"),
    "cider_d": ("CIDEr-D", "CIDEr-D"),
    "bleu_4": ("BLEU-4", "BLEU-4"),
    "chair_i": ("objects named that are wrong", "说错的物体占所说物体"),
    "chair_s": ("descriptions with a wrong object", "有说错物体的描述"),
    "n": ("questions", "问题数"),
}
CONTROLS = {
    "blind": ("The model saw a blank image in place of each of these.", "模型看到的都是空白图片。"),
    "shuffled": (
        "The model saw another image of the file in place of each of these.",
        "模型看到的不是这里的图片，而是文件中的另一张。",
    ),
}


@dataclass(frozen=True)
class Verdict:
    """What is right and wrong about one answer."""

    right: bool | None  # None: a caption that is like its references, more or less
    cider_d: float
    absent: tuple[tuple[str, str], ...]  # what it names and is not there, in English and Chinese

    @property
    def order(self) -> tuple[bool, float, int]:
        """What sorts answers, the worst first."""
        return self.right is True, self.cider_d, -len(self.absent)


def judge(records: Sequence[Record], answers: Sequence[str]) -> list[Verdict]:
    """A verdict about each answer.

    An answer that equals a reference is right, and one that differs from a single reference is
    wrong. Of several references, which are people's captions, an answer need not equal any.

    What it names and is not there: objects of a record of kind "describe" (`wrong_items`), and
    things that none of several captions mentions or hints at (`things_named`).
    """
    groups = [references_of(record) for record in records]
    scores = cider_d_of_each(
        [tokenize(answer) for answer in answers],
        [[tokenize(text) for text in group] for group in groups],
    )
    verdicts = []
    for record, answer, group, score in zip(records, answers, groups, scores):
        right = is_right(record, answer) or (False if len(group) == 1 else None)
        absent: list[tuple[str, str]] = []
        if is_description(record):
            absent = [(item, item) for item in wrong_items(answer, group)]
        elif len(group) > 1:
            absent = [(it.en_name, it.zh_name) for it in things_named(answer, group)[1]]
        verdicts.append(Verdict(right, score, tuple(absent)))
    return verdicts


def draw_gallery(
    path: Path,
    title: str,
    answered: Sequence[tuple[Record, str]],
    figures: Mapping[str, float],
    control: str = "none",
) -> None:
    """Write the page about records with their answers; one image at a time is in memory.

    figures: those of the whole run, as `score` gives them.
    """
    records, answers = [list(part) for part in zip(*answered)]
    verdicts = judge(records, answers)
    worst_first = sorted(range(len(records)), key=lambda place: verdicts[place].order)

    def body() -> Iterator[str]:
        if control in CONTROLS:
            yield f'<p class="absent">{_both(*CONTROLS[control])}</p>\n'
        yield _summary(figures, answers, verdicts, [len(references_of(each)) for each in records])
        choices = "".join(
            f'<label><input type="radio" name="order" id="{name}"{" checked" * (not number)}> '
            f"{_both(*texts)}</label>"
            for number, (name, *texts) in enumerate(ORDERS)
        )
        button = '<button id="language" type="button">中文 / English</button>'
        yield f'<fieldset>{choices}{button}</fieldset>\n<div class="cards">\n'
        for rank, place in enumerate(worst_first):
            order = f"--rank: {rank}; --place: {place}"
            yield _card(records[place], answers[place], verdicts[place], order)
        yield "</div>\n"

    write_page(path, title, body(), style=STYLE, script=SCRIPT)


def _summary(
    figures: Mapping[str, float],
    answers: Sequence[str],
    verdicts: Sequence[Verdict],
    num_references: Sequence[int],
) -> str:
    """The run's figures, and what they hide: answers that repeat, and things that are not there."""
    rows = [(FIGURES.get(name, (name, name)), f"{value:,}") for name, value in figures.items()]
    captions = [each for each, count in zip(verdicts, num_references) if count > 1]
    if captions:
        share = sum(bool(each.absent) for each in captions) / len(captions)
        rows.append(
            (("captions naming what is not there", "说了图中没有的东西的描述"), f"{share:.1%}")
        )
    counted = Counter(answers)
    ((often, times),) = counted.most_common(1)
    rows.append((("different answers", "不同的回答"), f"{len(counted):,}"))
    share = f"{times / len(answers):.1%}: {often}"
    rows.append((("most frequent answer", "最常见的回答"), share))
    listed = "".join(f"<dt>{_both(*names)}</dt><dd>{shown(text)}</dd>\n" for names, text in rows)
    return f"<dl>\n{listed}</dl>\n"


def _card(record: Record, answer: str, verdict: Verdict, order: str) -> str:
    images = [thumbnail(path, SIDE) for path in record.images[:IMAGES_SHOWN]]
    if not all(images):
        images.append(f"<p>{_both('An image cannot be read.', '有图片无法读取。')}</p>")
    question = next((turn for turn in reversed(record.messages) if turn.role == "user"), None)
    references = references_of(record)
    listed = "".join(f"<li>{shown(text)}</li>" for text in references[:REFERENCES_SHOWN])
    said = "wrong" if verdict.right is False else "right" if verdict.right else ""
    parts = [
        *images,
        f'<p class="question">{shown(question.text if question else "")}</p>',
        f'<p class="answer {said}">{shown(answer) or "–"}</p>',
    ]
    if verdict.absent:
        english = "names what is not there: " + ", ".join(one for one, _ in verdict.absent)
        chinese = "说了图中没有的：" + "、".join(other for _, other in verdict.absent)
        parts.append(f'<p class="absent">{_both(english, chinese)}</p>')
    verdict_texts = {True: ("right · ", "正确 · "), False: ("wrong · ", "错误 · "), None: ("", "")}
    english, chinese = (
        f"{text}CIDEr-D {verdict.cider_d:.2f}" for text in verdict_texts[verdict.right]
    )
    parts.append(f"<ul>{listed}</ul>")
    parts.append(f'<p class="where">{_both(english, chinese)} · {shown(record.where)}</p>')
    return f'<div class="card" style="{order}">' + "".join(parts) + "</div>\n"


def _both(english: str, chinese: str) -> str:
    """A text in both languages, of which the page shows one."""
    return f'<span lang="en">{shown(english)}</span><span lang="zh">{shown(chinese)}</span>'
