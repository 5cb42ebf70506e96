"""Pairs of descriptions, a right one and a wrong one, for `--objective dpo`: of scenes of the toy world, or of photos.

    python data_tools/make_preferences.py --model runs/stage2/model
    python data_tools/make_preferences.py --model runs/photos-stage2/model --data DIR/train_zh.jsonl --out DIR/pairs.jsonl

asks the model for descriptions of training images, several times each at random, and pairs every different one that names
an object which is not there with a right description (kind "own"). Of photos, right is what people wrote (`references` of
the records), and not there is a thing that none of them mentions or leaves possible (`caption_questions.py`).

Of scenes, whose objects are known, there are two more kinds. A share of the scenes also gets a description that is
spoiled on purpose (kind "spoiled"): one object takes another colour or shape, one is added, or one is left out. The same
model, data and seed give the same pairs. Without --model all descriptions are spoiled ones.

A share of the scenes' other questions comes along with the answer of another such question as the rejected one (kind
"other"): without them, the model unlearns to count while it learns to describe.
"""

import argparse
import dataclasses
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

from tqdm import tqdm

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # the repository, so that a plain clone works

from data_tools.caption_questions import things_named  # noqa: E402
from data_tools.scenes_text import THERE_IS, YES_NO, describe, parse_description  # noqa: E402
from data_tools.scenes_world import COLOURS, MAX_OBJECTS, SHAPES, SIZES, Scene, SceneObject  # noqa: E402
from nanovlm.data.records import Record, read_records  # noqa: E402
from nanovlm.errors import NanoVLMError
from nanovlm.evaluation.answers import answer_records, references_of  # noqa: E402
from nanovlm.generate import Sampling  # noqa: E402
from nanovlm.hub.models import load_model
from nanovlm.inputs.chat import IMAGE, IMAGE_MARKER  # noqa: E402
from nanovlm.model.vlm import VisionLanguageModel  # noqa: E402
from nanovlm.utils.console import run_command, say  # noqa: E402
from nanovlm.utils.device import choose_device  # noqa: E402
from nanovlm.utils.files import to_jsonl, write_atomically  # noqa: E402
from nanovlm.utils.parser import CommandParser

BATCH_SIZE = 128  # descriptions written at once
MAX_NEW_TOKENS = 64
FROM_THE_SCENE = 0.5  # share of spoiled attributes taken from elsewhere in the scene, which is how a model confuses things


def make_pairs(
    records: Sequence[Record],
    model: VisionLanguageModel | None,
    samples: int,
    temperature: float,
    spoiled: float,
    seed: int,
) -> list[dict]:
    """Pairs of descriptions; `samples` answers of the model to each of `records`, and the share `spoiled` of them spoiled."""
    own: list[list[str]] = [[] for _ in records]
    for number in range(samples if model is not None else 0):
        sampling = Sampling(temperature=temperature, seed=seed + number)
        answers = answer_records(model, records, MAX_NEW_TOKENS, BATCH_SIZE, sampling=sampling)
        for told, answer in zip(
            own,
            tqdm(
                answers,
                total=len(records),
                desc=f"describing, {number + 1} of {samples}",
                unit="image",
                dynamic_ncols=True,
            ),
        ):
            told += [answer] if answer not in told else []
    return [
        pair
        for record, told in zip(records, own)
        for pair in _pairs_of(record, told, spoiled, seed)
    ]


def other_pairs(records: Sequence[Record], share: float, seed: int) -> list[dict]:
    """A share of `records`, each with a wrong answer in the words of its kind: yes for no, a number for a number."""
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
    """What a question's right and wrong answers have in common: its kind, the language, and whether they are yes and no."""
    (right,) = references_of(record)
    verdict = next(
        (words for table in (YES_NO, THERE_IS) for words in table.values() if right in words), ()
    )
    return record.extra["kind"], right.isascii(), verdict


def _pair(record: Record, right: str, wrong: str, kind: str) -> dict:
    prompt = "".join(IMAGE_MARKER if part is IMAGE else part for part in record.messages[0].content)
    return {
        "image": str(record.images[0]),
        "prompt": prompt.removeprefix(f"{IMAGE_MARKER}\n"),
        "chosen": right,
        "rejected": wrong,
        "kind": kind,
    }


def _random(record: Record, seed: int) -> Random:
    """Random numbers of its own, whatever other records are there: by the line of its file."""
    return Random(f"{seed}/{record.where.rpartition(':')[2]}")


def _pairs_of(record: Record, own: list[str], spoiled: float, seed: int) -> Iterator[dict]:
    right, rng = references_of(record), _random(record, seed)
    if not is_scene(record):
        yield from (
            _pair(record, rng.choice(right), answer, "own")
            for answer in own
            if things_named(answer, right)[1]
        )
        return
    wrong = [("own", answer) for answer in own if names_wrong_object(answer, *right)]
    if rng.random() < spoiled:
        wrong.append(
            ("spoiled", spoil(scene_of(record), rng, "zh" if right[0].startswith("图") else "en"))
        )
    yield from (_pair(record, *right, answer, kind) for kind, answer in wrong)


def is_one_question(record: Record) -> bool:
    """Whether it is a single question about a single image, which is what a pair asks again."""
    return len(record.images) == 1 and [message.role for message in record.messages] in (
        ["user"],
        ["user", "assistant"],
    )


def is_scene(record: Record) -> bool:
    """Whether it describes a scene of the toy world, all of whose objects the record tells."""
    return "objects" in record.extra


def names_wrong_object(answer: str, right: str) -> bool:
    """Whether a description names something that the right one does not. What is no description at all teaches nothing
    about seeing, and does not count."""
    named = parse_description(answer)
    return named is not None and bool(named - parse_description(right))


def scene_of(record: Record) -> Scene:
    """The scene as far as a description needs it."""
    return Scene(
        tuple(
            SceneObject(**thing, radius=0.0, angle=0.0, rgb=(0, 0, 0))
            for thing in record.extra["objects"]
        ),
        "",
        0,
    )


def spoil(scene: Scene, rng: Random, language: str) -> str:
    """A description in which one object has another colour or another shape, is named beside one more, or is left out.

    Of objects too many and too few there are equally many: else what is learned is to name fewer, or more.
    """
    right, number = describe(scene, language), len(scene.objects)
    what = rng.choice(("colour", "shape", "extra", "missing"))
    if what == ("extra" if number == MAX_OBJECTS else "missing" if number == 1 else ""):
        what = "colour"
    while True:
        place = rng.randrange(number)
        before, thing, after = (
            scene.objects[:place],
            scene.objects[place : place + 1],
            scene.objects[place + 1 :],
        )
        attributes = rng.sample(("colour", "shape", "size"), 2) if what == "extra" else (what,)
        middle = () if what == "missing" else (_changed(*thing, scene.objects, rng, attributes),)
        objects = before + middle + (thing if what == "extra" else ()) + after
        text = describe(dataclasses.replace(scene, objects=objects), language)
        if parse_description(text) != parse_description(right):
            return text


def _changed(
    thing: SceneObject, others: Sequence[SceneObject], rng: Random, attributes: Sequence[str]
) -> SceneObject:
    """The object with other values, from another object of the scene or from the whole world."""
    values = {"colour": list(COLOURS), "shape": list(SHAPES), "size": list(SIZES)}
    for attribute in attributes:
        choices = (
            [getattr(other, attribute) for other in others]
            if rng.random() < FROM_THE_SCENE
            else values[attribute]
        )
        thing = dataclasses.replace(thing, **{attribute: rng.choice(choices)})
    return thing


def parse_arguments() -> argparse.Namespace:
    """Read the flags."""
    parser = CommandParser(
        description="Pairs of descriptions, right and wrong, for --objective dpo."
    )
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="model whose own wrong descriptions are used"
    )
    parser.add_argument(
        "--data",
        default="data/scenes/train.jsonl",
        metavar="FILE",
        help="records of scenes, or of photos with their captions as references (%(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("data/scenes/pairs.jsonl"),
        metavar="FILE",
        help="(%(default)s)",
    )
    parser.add_argument(
        "--limit", type=int, default=0, metavar="N", help="take the first N images only"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=2,
        metavar="N",
        help="descriptions of each by the model (%(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="at which it is sampled (%(default)s)",
    )
    parser.add_argument(
        "--spoiled",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="share of the scenes that also get a spoiled description (%(default)s; without --model all)",
    )
    parser.add_argument(
        "--others",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="share of the scenes' other questions that come along (%(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same pairs (%(default)s)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    return parser.parse_args()


def main() -> None:
    """Read scenes, ask the model, write the pairs, say how many."""
    arguments = parse_arguments()
    if (
        arguments.limit < 0
        or arguments.samples < 1
        or not all(0 <= share <= 1 for share in (arguments.spoiled, arguments.others))
    ):
        raise NanoVLMError(
            "--limit starts at 0 (all), --samples at 1, and --spoiled and --others are between 0 and 1"
        )
    if not arguments.out.parent.is_dir():
        raise NanoVLMError(
            f"{arguments.out.parent}: is not a folder; make it, so that --out can be written"
        )
    records, skipped = read_records(arguments.data)
    for reason in skipped:
        say(f"skipped: {reason}")
    everything = [record for record in records if is_one_question(record)]
    records = [
        record
        for record in everything
        if (record.extra.get("kind") == "describe" if is_scene(record) else record.references)
    ]
    records = records[: arguments.limit or None]
    if not records:
        raise NanoVLMError(
            f"{arguments.data}: holds neither scenes nor photos with captions as references "
            "(data_tools/make_scenes.py, data_tools/flickr8k_cn.py)"
        )
    if not arguments.model and not all(map(is_scene, records)):
        raise NanoVLMError(
            f"{arguments.data}: of photos only a model's own captions are paired; give --model"
        )
    model = None
    if arguments.model:
        model = load_model(arguments.model).to(choose_device(arguments.device))
    pairs = make_pairs(
        records,
        model,
        arguments.samples,
        arguments.temperature,
        arguments.spoiled if model else 1.0,
        arguments.seed,
    )
    shown = {record.images for record in records}
    others = [
        record
        for record in everything
        if record.images in shown and record.extra.get("kind", "describe") != "describe"
    ]
    pairs += other_pairs(others, arguments.others, arguments.seed)
    if not pairs:
        raise NanoVLMError(
            "the model names nothing wrong in any description; raise --temperature, --samples or --spoiled"
        )
    for pair in pairs:  # paths are read relative to the file
        pair["image"] = os.path.relpath(pair["image"], arguments.out.parent)
    write_atomically(arguments.out, to_jsonl(pairs))
    kinds = Counter(pair["kind"] for pair in pairs)
    say(
        f"{arguments.out}: {len(pairs):,} pairs from {len(records):,} images, {kinds['own']:,} with the model's own wrong "
        f"descriptions, {kinds['spoiled']:,} with spoiled ones, {kinds['other']:,} of other questions"
    )


if __name__ == "__main__":
    run_command(main)
