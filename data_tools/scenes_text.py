"""The language of the toy world: questions with one right answer, and descriptions that parse.

The scene and the question determine the answer word for word, so an exact match is a fair measure.
Nothing here draws: `questions(random_scene(rng), rng)` also makes a corpus of text alone.
"""

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from data_tools.scenes_world import (
    COLOURS,
    MARGIN,
    SHAPES,
    SIZES,
    TRAIN_PAIRS,
    Pair,
    Scene,
    SceneObject,
)

ENGLISH_SHARE = 0.3
QUESTIONS_PER_SCENE = 8
NUMBERS = {"zh": ("一", "两", "三", "四"), "en": ("one", "two", "three", "four")}
YES_NO = {"zh": ("是。", "不是。"), "en": ("Yes.", "No.")}
THERE_IS = {"zh": ("有。", "没有。"), "en": ("Yes.", "No.")}

# {a} and {b} stand for objects, {side} for one of SIDES, {p} and {q} for the words of a comparison.
TEMPLATES = {
    "zh": {
        "describe": (
            "描述图片",
            "描述这张图片。",
            "请描述图片的内容。",
            "图里有什么？",
            "图中有哪些物体？",
        ),
        "what": ("图里的物体是什么？", "这是什么？", "图中画的是什么？"),
        "what_at": ("最{side}的物体是什么？", "图里最{side}是什么？"),
        "colour": ("{a}是什么颜色的？", "图里的{a}是什么颜色？", "{a}的颜色是什么？"),
        "shape": ("{a}是什么形状的？", "图里{a}是什么形状？", "{a}的形状是什么？"),
        "count": ("图里有几个物体？", "图中一共有多少个物体？", "数一数，有几个物体？"),
        "exists": ("图里有{a}吗？", "图中有没有{a}？", "画面里有{a}吗？"),
    },
    "en": {
        "describe": (
            "Describe the picture.",
            "Describe this image.",
            "What is in the picture?",
            "What does it show?",
        ),
        "what": ("What is the object in the picture?", "What is this?"),
        "what_at": ("What is the {side} object?", "Name the {side} object."),
        "colour": ("What colour is {a}?", "Name the colour of {a}."),
        "shape": ("What shape is {a}?", "Name the shape of {a}."),
        "count": ("How many objects are there?", "How many objects can you see?"),
        "exists": ("Is there {a}?", "Does the picture show {a}?"),
    },
}
SIDES = {
    "zh": ("左边", "右边", "上面", "下面"),
    "en": ("leftmost", "rightmost", "topmost", "bottommost"),
}

# For each relation: two words, and three questions, which are answered by one of the words, by the
# name of an object, and by yes or no. The first word means smaller x, smaller y, or larger size.
COMPARISONS = {
    "zh": {
        "left_right": (
            ("左边", "右边"),
            "{a}在{b}的{p}还是{q}？",
            "{a}和{b}，哪个更靠{p}？",
            "{a}在{b}的{p}吗？",
        ),
        "above_below": (
            ("上面", "下面"),
            "{a}在{b}的{p}还是{q}？",
            "{a}和{b}，哪个更靠{p}？",
            "{a}在{b}的{p}吗？",
        ),
        "larger_smaller": (
            ("大", "小"),
            "{a}比{b}{p}还是{q}？",
            "{a}和{b}，哪个更{p}？",
            "{a}比{b}{p}吗？",
        ),
    },
    "en": {
        "left_right": (
            ("left", "right"),
            "Is {a} to the {p} or to the {q} of {b}?",
            "Which is further to the {p}, {a} or {b}?",
            "Is {a} to the {p} of {b}?",
        ),
        "above_below": (
            ("above", "below"),
            "Is {a} {p} or {q} {b}?",
            "Which one is {p} the other, {a} or {b}?",
            "Is {a} {p} {b}?",
        ),
        "larger_smaller": (
            ("larger", "smaller"),
            "Is {a} {p} or {q} than {b}?",
            "Which is {p}, {a} or {b}?",
            "Is {a} {p} than {b}?",
        ),
    },
}
RELATIONS = ("left_right", "above_below", "larger_smaller")  # the hardest, so asked up to twice
KINDS = ("describe", "what", "colour", "shape", "count", "exists", *RELATIONS)


@dataclass(frozen=True)
class Question:
    """A question of one of KINDS and its only right answer, both in `language` ("zh" or "en")."""

    kind: str
    language: str
    text: str
    answer: str


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _name(pair: Pair, language: str) -> str:
    """红色圆形, or red circle."""
    colour, shape = pair
    return COLOURS[colour] + SHAPES[shape] if language == "zh" else f"{colour} {shape}"


def _the(pair: Pair, language: str) -> str:
    return _name(pair, language) if language == "zh" else "the " + _name(pair, language)


def _sentence(words: str, language: str) -> str:
    return words + "。" if language == "zh" else words[0].upper() + words[1:] + "."


def _pair(thing: SceneObject) -> Pair:
    return thing.colour, thing.shape


def describe(scene: Scene, language: str) -> str:
    """The description of a scene: size, colour and shape of every object, from left to right."""
    objects, number = scene.objects, NUMBERS[language][len(scene.objects) - 1]
    if language == "zh":
        named = [f"{SIZES[thing.size]}的{_name(_pair(thing), 'zh')}" for thing in objects]
        order = "，从左到右是" if len(objects) > 1 else ""
        return f"图中有{number}个物体{order}：{'、'.join(named)}。"
    named = [f"a {thing.size} {_name(_pair(thing), 'en')}" for thing in objects]
    if len(objects) == 1:
        return f"There is one object: {named[0]}."
    return f"There are {number} objects, from left to right: {', '.join(named)}."


def _pattern(names: Sequence[str]) -> str:
    return "(" + "|".join(names) + ")"


_KEYS = {
    name: key
    for table in (SIZES, COLOURS, SHAPES)
    for key, word in table.items()
    for name in (key, word)
}
_DESCRIPTION = {
    "zh": re.compile(rf"图中有({'|'.join(NUMBERS['zh'])})个物体(?:，从左到右是)?：(.*)。"),
    "en": re.compile(
        rf"There (?:is|are) ({'|'.join(NUMBERS['en'])}) objects?(?:, from left to right)?: (.*)\."
    ),
}
_OBJECT = {
    "zh": re.compile(
        "{}的{}{}".format(*(_pattern(list(table.values())) for table in (SIZES, COLOURS, SHAPES)))
    ),
    "en": re.compile(
        "a {} {} {}".format(*(_pattern(list(table)) for table in (SIZES, COLOURS, SHAPES)))
    ),
}


def parse_description(text: str) -> Counter[tuple[str, str, str]] | None:
    """Parse a description: the count of each (size, colour, shape), in English, in any order.

    None if the text is not a description in the words of `describe`, or if it announces another
    number of objects than it names. Two descriptions, in whatever language, have the same meaning
    if their results are equal.
    """
    for language, separator in (("zh", "、"), ("en", ", ")):
        whole = _DESCRIPTION[language].fullmatch(text.strip())
        if whole is None:
            continue
        objects = []
        for part in whole[2].split(separator):
            named = _OBJECT[language].fullmatch(part)
            if named is None:
                return None
            objects.append((_KEYS[named[1]], _KEYS[named[2]], _KEYS[named[3]]))
        if NUMBERS[language].index(whole[1]) + 1 != len(objects):
            return None
        return Counter(objects)
    return None


def questions(
    scene: Scene, rng: Random, pairs: Sequence[Pair] = TRAIN_PAIRS, language: str | None = None
) -> list[Question]:
    """Up to eight different questions: "describe" first, and each relation at most twice.

    `pairs` are the (colour, shape) pairs that scenes are composed of. Where the answer to "is there
    …" is no, the question names another of them, or one of TRAIN_PAIRS that shares its colour or
    its shape with the scene. `language` is drawn for each question (30 % English) unless given.
    """
    asked = []
    # A kind that a scene has no objects for is not replaced by another, because the kinds asked
    # would then hint at answers: with one object there is no left and right, so "how many" would be
    # asked more often where the answer is one.
    for kind in ["describe", *rng.sample(KINDS[1:] + RELATIONS, QUESTIONS_PER_SCENE - 1)]:
        spoken = language or ("en" if rng.random() < ENGLISH_SHARE else "zh")
        found = _ask(kind, scene, rng, pairs, spoken)
        if found is not None and all(found[0] != question.text for question in asked):
            asked.append(Question(kind, spoken, *found))
    return asked


def _ask(
    kind: str, scene: Scene, rng: Random, pairs: Sequence[Pair], language: str
) -> tuple[str, str] | None:
    """Question and answer of one kind, or None if the scene has no clear answer to it."""
    if kind in COMPARISONS[language]:
        return _ask_comparison(kind, scene, rng, language)
    if kind == "exists":
        return _ask_exists(scene, rng, pairs, language)
    if kind in ("colour", "shape"):
        return _ask_attribute(kind, scene, rng, language)
    template = rng.choice(TEMPLATES[language][kind])
    if kind == "describe":
        return template, describe(scene, language)
    if kind == "count":
        number = NUMBERS[language][len(scene.objects) - 1]
        return template, _sentence(number + "个" if language == "zh" else number, language)
    thing = scene.objects[0]
    if len(scene.objects) > 1:
        side, thing = rng.choice(_extremes(scene))
        template = rng.choice(TEMPLATES[language]["what_at"]).format(side=SIDES[language][side])
    name = _name(_pair(thing), language)
    return template, _sentence(name if language == "zh" else _article(name), language)


def _extremes(scene: Scene) -> list[tuple[int, SceneObject]]:
    """(index into SIDES, object) for each side with one object that is clearly closest to it."""
    found = []
    for side, (axis, sign) in enumerate((("x", 1), ("x", -1), ("y", 1), ("y", -1))):
        first, second = sorted(scene.objects, key=lambda thing: sign * getattr(thing, axis))[:2]
        if abs(getattr(first, axis) - getattr(second, axis)) >= MARGIN:
            found.append((side, first))
    return found


def _ask_attribute(kind: str, scene: Scene, rng: Random, language: str) -> tuple[str, str]:
    """Ask for the colour of an object given by shape or position, or for the shape likewise."""
    given, names, other_names = (
        ("shape", COLOURS, SHAPES) if kind == "colour" else ("colour", SHAPES, COLOURS)
    )
    thing = rng.choice(scene.objects)
    alike = sum(getattr(other, given) == getattr(thing, given) for other in scene.objects)
    if alike > 1 or (len(scene.objects) > 1 and rng.random() < 0.3):
        side, thing = rng.choice(_extremes(scene))
        which = SIDES[language][side]
        reference = f"最{which}的物体" if language == "zh" else f"the {which} object"
    else:
        word = getattr(thing, given)
        noun = "" if kind == "colour" else "的物体" if language == "zh" else " object"
        reference = (other_names[word] if language == "zh" else f"the {word}") + noun
    answer = getattr(thing, kind)
    text = rng.choice(TEMPLATES[language][kind]).format(a=reference)
    return text, _sentence(names[answer] if language == "zh" else answer, language)


def _ask_exists(scene: Scene, rng: Random, pairs: Sequence[Pair], language: str) -> tuple[str, str]:
    """Ask whether something is there: half yes, half no.

    In two thirds of the negative questions about a pair, the scene has its colour or its shape.
    """
    present = [_pair(thing) for thing in scene.objects]
    colours, shapes = {colour for colour, _ in present}, {shape for _, shape in present}
    is_there = rng.random() < 0.5
    form = rng.choice(("pair", "pair", "colour", "shape"))
    if form == "pair":
        far = [pair for pair in pairs if pair[0] not in colours and pair[1] not in shapes]
        absent = [pair for pair in TRAIN_PAIRS if pair not in present]
        near = [pair for pair in absent if pair[0] in colours or pair[1] in shapes]
        pair = rng.choice(present if is_there else near if not far or rng.random() < 2 / 3 else far)
        name = _name(pair, language)
    elif form == "colour":
        colour = rng.choice(sorted(colours if is_there else COLOURS.keys() - colours))
        name = f"{COLOURS[colour]}的物体" if language == "zh" else f"{colour} object"
    else:
        shape = rng.choice(sorted(shapes if is_there else SHAPES.keys() - shapes))
        name = SHAPES[shape] if language == "zh" else shape
    text = rng.choice(TEMPLATES[language]["exists"]).format(
        a=name if language == "zh" else _article(name)
    )
    return text, THERE_IS[language][not is_there]


def _ask_comparison(kind: str, scene: Scene, rng: Random, language: str) -> tuple[str, str] | None:
    """Compare two objects that clearly differ in x, in y, or in size."""
    comes_first = {
        "left_right": lambda one, other: other.x - one.x >= MARGIN,
        "above_below": lambda one, other: other.y - one.y >= MARGIN,
        "larger_smaller": lambda one, other: one.size == "big" and other.size == "small",
    }[kind]
    ordered = [pair for pair in itertools.permutations(scene.objects, 2) if comes_first(*pair)]
    if not ordered:
        return None
    words, either, which, whether = COMPARISONS[language][kind]
    first, second = rng.choice(ordered)  # words[0] is true of `first`, words[1] of `second`
    a, b = rng.sample((first, second), 2)
    p, q = rng.sample(words, 2)
    truth = words[a is second]
    names = {"a": _the(_pair(a), language), "b": _the(_pair(b), language), "p": p, "q": q}
    form = rng.randrange(3)
    if form == 0:
        return _capital(either.format(**names)), _sentence(truth, language)
    if form == 1:
        answer = names["a" if p == truth else "b"]
        return _capital(which.format(**names)), _sentence(answer, language)
    return _capital(whether.format(**names)), YES_NO[language][p != truth]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
