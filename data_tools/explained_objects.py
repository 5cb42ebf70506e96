"""Whether a model's explanations find the objects of the toy world, whose outlines are known.

    python -m data_tools.explained_objects --model runs/stage2/model --limit 100

lets the model describe scenes, explains the colour and the shape of each object that it names
(`nanovlm/explain/`), and prints one JSON line of means over these words: {"inside": …, "area": …,
"words": …, "n": …}. `inside` is the share of a word's parts that lies inside the object's outline,
`area` the share of the image that the outline covers, which is what parts without any order would
give. A patch's part is taken to be spread evenly over it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a plain clone

# First, because Ctrl-C is one line from here on, also during the slow imports below.
from nanovlm.utils.console import run_command

# isort: split
import json
from random import Random
from statistics import fmean

import numpy as np
from tqdm import tqdm

from data_tools.make_scenes import DEFAULT_OUT, SPLITS
from data_tools.scenes_world import COLOURS, SHAPES, Scene, coverage, draw, random_scene
from nanovlm.data.collate import prepare
from nanovlm.data.records import Record, read_records
from nanovlm.engine.loading import add_model_flags, add_named_folder_flag, load_for_answers
from nanovlm.errors import NanoVLMError
from nanovlm.explain.attribution import ExplainedWord, explain, refuse_few_bits
from nanovlm.explain.places import spread
from nanovlm.generate import generate
from nanovlm.inputs.image import open_image
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.utils.files import read_json
from nanovlm.utils.parser import CommandParser

ENGLISH = {chinese: english for names in (COLOURS, SHAPES) for english, chinese in names.items()}
MAX_NEW_TOKENS = 64


def main() -> None:
    """Read the flags, measure, print."""
    arguments = _parser().parse_args()
    if arguments.limit < 0:
        raise NanoVLMError("--limit has to be above 0")
    refuse_few_bits(arguments.quantize)
    records, _ = read_records(arguments.data)
    described = [record for record in records if record.extra.get("kind") == "describe"]
    described = described[: arguments.limit or None]
    if not described:
        raise NanoVLMError(f"{arguments.data}: holds no scene that is described")
    scenes = [scene_of(record) for record in described]
    model = load_for_answers(arguments.model, arguments)
    shares = []
    pairs = tqdm(list(zip(described, scenes)), "explaining", unit="scene", dynamic_ncols=True)
    for record, scene in pairs:
        shares += shares_inside(model, record, scene)
    if not shares:
        raise NanoVLMError("the model names no object that is in the scenes")
    inside, area = (round(fmean(numbers), 4) for numbers in zip(*shares))
    print(json.dumps({"inside": inside, "area": area, "words": len(shares), "n": len(described)}))


def scene_of(record: Record) -> Scene:
    """The scene that a record shows, composed anew; raises for one of another world."""
    path = record.images[0]
    folder, split = path.parents[2], path.parent.name
    try:
        world = read_json(folder / "world.json")
        scene = random_scene(Random(f"{world['seed']}/{split}/{int(path.stem)}"), SPLITS[split])
        if np.array_equal(np.asarray(open_image(path)), np.asarray(draw(scene))):
            return scene
    except (IndexError, KeyError, ValueError):
        pass
    raise NanoVLMError(
        f"{path}: is no scene of the toy world as data_tools/make_scenes.py draws it now; "
        "draw the scenes anew"
    )


def shares_inside(
    model: VisionLanguageModel, record: Record, scene: Scene
) -> list[tuple[float, float]]:
    """For each colour and shape of the answer: the share of its parts inside the outline, and the
    share of the image that the outline covers.

    What is named and not in the scene is left out.
    """
    images = [open_image(record.images[0])]
    prompt = prepare(model, [record.messages[:-1]], [images], add_generation_prompt=True)
    prompt = prompt.to(next(model.parameters()).device)
    (answer,) = generate(model, prompt, MAX_NEW_TOKENS)
    outlines = {
        (thing.colour, thing.shape): np.asarray(coverage(thing)) / 255 for thing in scene.objects
    }
    shares = []
    for name, words in named_pairs(explain(model, prompt, images, answer)):
        if name in outlines:
            inside = outlines[name]
            for word in words:
                parts = spread(word.maps[0], *images[0].size, model.config.image)
                shares.append((float((parts * inside).sum() / parts.sum()), float(inside.mean())))
    return shares


def named_pairs(
    words: list[ExplainedWord],
) -> list[tuple[tuple[str, str], tuple[ExplainedWord, ExplainedWord]]]:
    """Each colour of a description with the shape after it, by their English names."""
    pairs, colour = [], None
    for word in words:
        name = ENGLISH.get(word.text, word.text)
        if name in COLOURS:
            colour = name, word
        elif name in SHAPES and colour is not None:
            pairs.append(((colour[0], name), (colour[1], word)))
            colour = None
    return pairs


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m data_tools.explained_objects",
        description="Measure whether the words for an object of the toy world come from its place.",
    )
    add_named_folder_flag(parser)
    parser.add_argument(
        "--data",
        type=Path,
        default=DEFAULT_OUT / "val.jsonl",
        metavar="FILE",
        help="records of scenes (%(default)s)",
    )
    parser.add_argument(
        "--limit", type=int, default=0, metavar="N", help="take the first N scenes only"
    )
    add_model_flags(parser)
    return parser


if __name__ == "__main__":
    run_command(main)
