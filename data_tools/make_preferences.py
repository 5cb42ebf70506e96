"""Make preference pairs for `--objective dpo`: descriptions of toy scenes or of photos.

    python data_tools/make_preferences.py --model runs/stage2/model
    python data_tools/make_preferences.py --model runs/photos-stage2/model \\
        --data DIR/train_zh.jsonl --out DIR/pairs.jsonl

samples several descriptions of each training image from the model. Each distinct one that names an
object that is not there is rejected, and a right description is chosen (kind "own"). For photos,
people's captions are right (`references` of the records), and an object is not there if no caption
mentions it or leaves it possible (`nanovlm/evaluation/things.py`).

For scenes, whose objects are known, there are two more kinds. For a share of the scenes, a right
description is also spoiled (kind "spoiled"): an object changes its colour or shape, or one is added
or left out. And a share of the other questions about the scenes is paired with the answer to
another question like it (kind "other"); without these, the model forgets how to count while it
learns to describe.

The same model, data and seed give the same pairs. Without --model, all descriptions are spoiled.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a plain clone

# First, because Ctrl-C is one line from here on, also during the slow imports below.
from nanovlm.utils.console import run_command, say

# isort: split
import argparse
import dataclasses
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from random import Random

from tqdm import tqdm

from data_tools.scenes_text import THERE_IS, YES_NO, describe, parse_description
from data_tools.scenes_world import COLOURS, MAX_OBJECTS, SHAPES, SIZES, Scene, SceneObject
from nanovlm.data.records import Record, read_records, record_files, say_skipped
from nanovlm.errors import NanoVLMError
from nanovlm.evaluation.answers import answer_records, references_of
from nanovlm.evaluation.things import things_named
from nanovlm.hub.models import load_model
from nanovlm.inputs.chat import IMAGE_MARKER
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.sampling import Sampling
from nanovlm.utils.device import add_device_flag, choose_device
from nanovlm.utils.files import to_jsonl
from nanovlm.utils.outputs import check_new_file, write_new
from nanovlm.utils.parser import CommandParser, expand_user

BATCH_SIZE = 128  # descriptions written at once
MAX_NEW_TOKENS = 64
# Share of the changed attributes that come from other objects of the scene, as in models' mistakes.
FROM_THE_SCENE = 0.5


def make_pairs(
    records: Sequence[Record],
    model: VisionLanguageModel | None,
    samples: int,
    temperature: float,
    spoiled: float,
    seed: int,
) -> list[dict]:
    """Pairs of descriptions of `records`.

    The model answers each `samples` times; a share `spoiled` of the scenes gets a spoiled pair too.
    """
    own: list[list[str]] = [[] for _ in records]
    if model is not None:
        for number in range(samples):
            sampling = Sampling(temperature=temperature, seed=seed + number)
            answers = answer_records(model, records, MAX_NEW_TOKENS, BATCH_SIZE, sampling=sampling)
            title = f"describing, {number + 1} of {samples}"
            bar = tqdm(answers, title, total=len(records), unit="image", dynamic_ncols=True)
            for descriptions, answer in zip(own, bar):
                if answer is not None and answer not in descriptions:
                    descriptions.append(answer)
    pairs = []
    for record, descriptions in zip(records, own):
        pairs += _pairs_of(record, descriptions, spoiled, seed)
    return pairs


def other_pairs(records: Sequence[Record], share: float, seed: int) -> list[dict]:
    """Pairs of a share of `records`; a wrong answer has the form of the right one: no for yes."""
    alike: dict[tuple, list[str]] = defaultdict(list)
    for record in records:
        alike[_form(record)] += references_of(record)
    pairs = []
    for record in records:
        (right,), rng = references_of(record), _random(record, seed)
        wrong = sorted(set(alike[_form(record)]) - {right})
        if wrong and rng.random() < share:
            pairs.append(_pair(record, right, rng.choice(wrong), "other"))
    return pairs


def _form(record: Record) -> tuple:
    """What a right and a wrong answer have in common: kind, language, and whether yes or no."""
    (right,) = references_of(record)
    verdict = next(
        (words for table in (YES_NO, THERE_IS) for words in table.values() if right in words), ()
    )
    return record.extra["kind"], right.isascii(), verdict


def _pair(record: Record, right: str, wrong: str, kind: str) -> dict:
    content = record.messages[0].content
    prompt = "".join(part if isinstance(part, str) else IMAGE_MARKER for part in content)
    return {
        "image": str(record.images[0]),
        "prompt": prompt.removeprefix(f"{IMAGE_MARKER}\n"),
        "chosen": right,
        "rejected": wrong,
        "kind": kind,
    }


def _random(record: Record, seed: int) -> Random:
    """A generator seeded by the record's line in its file, so independent of other records."""
    return Random(f"{seed}/{record.where.rpartition(':')[2]}")


def _pairs_of(record: Record, own: list[str], spoiled: float, seed: int) -> Iterator[dict]:
    references, rng = references_of(record), _random(record, seed)
    if not is_scene(record):
        for answer in own:
            if things_named(answer, references)[1]:
                yield _pair(record, rng.choice(references), answer, "own")
        return
    (right,) = references
    for answer in own:
        if names_wrong_object(answer, right):
            yield _pair(record, right, answer, "own")
    if rng.random() < spoiled:
        language = "zh" if right.startswith("图") else "en"
        yield _pair(record, right, spoil(scene_of(record), rng, language), "spoiled")


def is_one_question(record: Record) -> bool:
    """Whether it is one question about one image, which is the form of a pair's prompt."""
    roles = [message.role for message in record.messages]
    return len(record.images) == 1 and roles in (["user"], ["user", "assistant"])


def is_scene(record: Record) -> bool:
    """Whether it is the description of a toy scene, for which the record lists all objects."""
    return "objects" in record.extra


def names_wrong_object(answer: str, right: str) -> bool:
    """Whether a description names something that the right one does not.

    A text that is not a description does not count: it would teach nothing about the image.
    """
    named, there = parse_description(answer), parse_description(right)
    return named is not None and there is not None and bool(named - there)


def scene_of(record: Record) -> Scene:
    """The scene of a record, as far as a description needs it."""
    unknown = {"radius": 0.0, "angle": 0.0, "rgb": (0, 0, 0)}
    objects = tuple(SceneObject(**thing, **unknown) for thing in record.extra["objects"])
    return Scene(objects, background="", background_seed=0)


def spoil(scene: Scene, rng: Random, language: str) -> str:
    """A description with an object of another colour or shape, or with one added or left out.

    Objects are added as often as left out; otherwise the model would learn to name fewer, or more.
    """
    right, number = describe(scene, language), len(scene.objects)
    what = rng.choice(("colour", "shape", "extra", "missing"))
    if what == ("extra" if number == MAX_OBJECTS else "missing" if number == 1 else ""):
        what = "colour"
    while True:
        place = rng.randrange(number)
        before, after = scene.objects[:place], scene.objects[place + 1 :]
        thing = scene.objects[place]
        attributes = rng.sample(("colour", "shape", "size"), 2) if what == "extra" else (what,)
        middle = () if what == "missing" else (_changed(thing, scene.objects, rng, attributes),)
        if what == "extra":
            middle = (*middle, thing)
        objects = before + middle + after
        text = describe(dataclasses.replace(scene, objects=objects), language)
        if parse_description(text) != parse_description(right):
            return text


def _changed(
    thing: SceneObject, others: Sequence[SceneObject], rng: Random, attributes: Sequence[str]
) -> SceneObject:
    """The object with other attributes, from an object of the scene or from the whole world."""
    world = {"colour": list(COLOURS), "shape": list(SHAPES), "size": list(SIZES)}
    for attribute in attributes:
        if rng.random() < FROM_THE_SCENE:
            choices = [getattr(other, attribute) for other in others]
        else:
            choices = world[attribute]
        thing = dataclasses.replace(thing, **{attribute: rng.choice(choices)})
    return thing


def read_questions(arguments: argparse.Namespace) -> tuple[list[Record], list[Record]]:
    """The records to describe, and the other questions about the same images."""
    records, skipped = read_records(arguments.data)
    say_skipped(skipped, len(records) + len(skipped))
    asked = [record for record in records if is_one_question(record)]
    described = [
        record
        for record in asked
        if (record.extra.get("kind") == "describe" if is_scene(record) else record.references)
    ]
    described = described[: arguments.limit or None]
    if not described:
        raise NanoVLMError(
            f"{arguments.data}: holds neither scenes nor photos with captions as references "
            "(data_tools/make_scenes.py, data_tools/flickr8k_cn.py)"
        )
    if not arguments.model and not all(map(is_scene, described)):
        raise NanoVLMError(
            f"{arguments.data}: of photos only a model's own captions are paired; give --model"
        )
    images = {record.images for record in described}
    others = [record for record in asked if record.extra.get("kind", "describe") != "describe"]
    return described, [record for record in others if record.images in images]


def parse_arguments() -> argparse.Namespace:
    """Read and check the flags."""
    parser = CommandParser(description="Make preference pairs of descriptions for --objective dpo.")

    def add(flag: str, default, metavar: str, text: str) -> None:
        kind = expand_user if isinstance(default, str) else type(default)
        parser.add_argument(
            flag, type=kind, default=default, metavar=metavar, help=f"{text} (%(default)s)"
        )

    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="model whose own wrong descriptions are used"
    )
    data = "records of scenes, or of photos with their captions as references"
    spoiled = "share of the scenes with a spoiled description too; without --model all"
    add("--data", "data/scenes/train.jsonl", "FILE", data)
    add("--out", "data/scenes/pairs.jsonl", "FILE", "file to write")
    add("--limit", 0, "N", "use the first N images only; 0 uses all")
    add("--samples", 2, "N", "descriptions of each image by the model")
    add("--temperature", 1.0, "T", "temperature at which they are sampled")
    add("--spoiled", 0.25, "SHARE", spoiled)
    add("--others", 0.05, "SHARE", "share of the other questions about the scenes")
    add("--seed", 0, "N", "the same seed gives the same pairs")
    add_device_flag(parser)
    arguments = parser.parse_args()
    arguments.out = Path(arguments.out)
    shares = arguments.spoiled, arguments.others
    is_share = all(0 <= share <= 1 for share in shares)
    if arguments.limit < 0 or arguments.samples < 1 or not is_share:
        raise NanoVLMError(
            "--limit starts at 0 (all), --samples at 1, and --spoiled and --others are between "
            "0 and 1"
        )
    inputs = [*record_files(arguments.data), *([arguments.model] if arguments.model else [])]
    check_new_file(arguments.out, "--out", inputs)
    return arguments


def main() -> None:
    """Read the records, ask the model, write the pairs, print their number."""
    arguments = parse_arguments()
    records, others = read_questions(arguments)
    model = None
    if arguments.model:
        model = load_model(arguments.model).to(choose_device(arguments.device))
    spoiled = arguments.spoiled if model else 1.0
    seed = arguments.seed
    pairs = make_pairs(records, model, arguments.samples, arguments.temperature, spoiled, seed)
    pairs += other_pairs(others, arguments.others, seed)
    if not pairs:
        raise NanoVLMError(
            "the model names nothing wrong in any description; raise --temperature, --samples or "
            "--spoiled"
        )
    for pair in pairs:  # paths are read relative to the file
        pair["image"] = os.path.relpath(pair["image"], arguments.out.parent)
    write_new(arguments.out, to_jsonl(pairs))
    kinds = Counter(pair["kind"] for pair in pairs)
    say(
        f"{arguments.out}: {len(pairs):,} pairs from {len(records):,} images, {kinds['own']:,} "
        f"with the model's own wrong descriptions, {kinds['spoiled']:,} with spoiled ones, "
        f"{kinds['other']:,} of other questions"
    )


if __name__ == "__main__":
    run_command(main)
