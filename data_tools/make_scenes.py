"""Draw the toy world of the tiny default: 64×64 scenes with questions in Chinese and English.

There are three splits: train, val (the same world, other scenes) and novel, in which every object
is a pair of colour and shape that train and val neither show nor mention. The same seed gives the
same bytes, whatever the number of workers.
"""

import sys
from pathlib import Path

if __name__ in ("__main__", "__mp_main__"):  # as a script, or in a worker process of one
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# First, because Ctrl-C is one line from here on, also during the slow imports below.
from nanovlm.utils.console import run_command, say

# isort: split
import hashlib
import io
import multiprocessing
import os
import re
import shutil
import signal
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from random import Random

from tqdm import tqdm

from data_tools.scenes_text import KINDS, questions
from data_tools.scenes_world import (
    COLOURS,
    HELD_OUT_PAIRS,
    SHAPES,
    TRAIN_PAIRS,
    Scene,
    draw,
    random_scene,
)
from nanovlm.errors import NanoVLMError
from nanovlm.utils.files import read_json, to_jsonl, write_atomically, write_json
from nanovlm.utils.interruption import kept_from_children
from nanovlm.utils.outputs import TakenError, new_folder
from nanovlm.utils.parser import CommandParser

VERSION = 1  # raise it whenever the same seed gives other bytes
SPLITS = {"train": TRAIN_PAIRS, "val": TRAIN_PAIRS, "novel": HELD_OUT_PAIRS}
DEFAULT_OUT = Path("data/scenes")


def make_scenes(
    out: str | Path = DEFAULT_OUT,
    scenes: int = 8000,
    seed: int = 0,
    workers: int = 0,
    eval_scenes: int = 600,
) -> Path:
    """Write the toy world to the folder `out`, unless it already holds these scenes.

    Writes {train,val,novel}.jsonl (a record a question), images/<split>/NNNNNN.png and world.json.
    `scenes` is the number of train's, `eval_scenes` that of val's and of novel's; `workers=0` uses
    all cores. The folder appears complete or not at all. Raises NanoVLMError if `out` holds
    anything else or cannot be written.
    """
    out = Path(out)
    if scenes < 1 or eval_scenes < 1 or workers < 0:
        given = f"--scenes {scenes} --eval-scenes {eval_scenes} --workers {workers}"
        raise NanoVLMError(f"{given}: scenes start at 1, workers at 0 (all cores)")
    settings = {"version": VERSION, "seed": seed, "scenes": scenes, "eval_scenes": eval_scenes}
    if _already_there(out, settings):
        say(f"{out}: already holds these scenes")
        return out
    say(f"{out}: drawing the toy world ({scenes} training scenes, seed {seed})")
    try:
        with new_folder(out, "--out") as folder:
            world = _fill(folder, settings, workers)
    except TakenError as taken:
        if not _already_there(out, settings):
            raise
        shutil.rmtree(taken.kept)  # another process has drawn the same
    else:
        say(*summary(world).split("\n"))
    return out


def _already_there(out: Path, settings: dict[str, int]) -> bool:
    """Whether the folder holds scenes with the same settings; an error if it holds other scenes."""
    advice = "delete it or choose another --out"
    if not (out / "world.json").is_file():
        return False
    world = read_json(out / "world.json")
    other = [
        f"{key} {world.get(key)} instead of {value}"
        for key, value in settings.items()
        if world.get(key) != value
    ]
    if other:
        raise NanoVLMError(f"{out}: holds scenes made with {', '.join(other)}; {advice}")
    missing = [f"{split}.jsonl" for split in SPLITS if not (out / f"{split}.jsonl").is_file()]
    if missing:
        raise NanoVLMError(f"{out}: lacks {', '.join(missing)}; {advice}")
    return True


def _fill(folder: Path, settings: dict[str, int], workers: int) -> dict:
    """Draw and write every split into `folder`; return the content of world.json."""
    jobs = []
    for split in SPLITS:
        (folder / "images" / split).mkdir(parents=True)
        count = settings["scenes" if split == "train" else "eval_scenes"]
        jobs += [(split, index) for index in range(count)]
    records, first_with = defaultdict(list), {}
    work = partial(_make_scene, folder, settings["seed"])
    done = _map_in_order(work, jobs, workers or os.cpu_count() or 1)
    for (split, index), (digest, made) in zip(jobs, done, strict=True):
        twin = first_with.setdefault(digest, (split, index))
        if twin != (split, index):
            raise NanoVLMError(
                f"scenes {twin} and {(split, index)} look the same; choose another --seed"
            )
        records[split] += made
    for split in SPLITS:
        write_atomically(folder / f"{split}.jsonl", to_jsonl(records[split]))
    kinds = {split: Counter(record["kind"] for record in records[split]) for split in SPLITS}
    world = {
        **settings,
        "held_out": [list(pair) for pair in HELD_OUT_PAIRS],
        "questions": {split: dict(counts) for split, counts in kinds.items()},
        "blind": blind_rates(records["train"]),
    }
    write_json(folder / "world.json", world)
    return world


def _map_in_order(
    work: partial, jobs: list[tuple[str, int]], workers: int
) -> Iterable[tuple[str, list[dict]]]:
    bar = partial(tqdm, total=len(jobs), desc="scenes", unit="scene")
    if workers == 1 or len(jobs) < 200:  # starting processes would take longer
        yield from bar(map(work, jobs))
        return
    # "spawn", as on macOS and Windows, so that all systems run the same code. Only the parent
    # process reacts to Ctrl-C.
    context = multiprocessing.get_context("spawn")
    ignore_interrupts = signal.signal, (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(workers, context, *ignore_interrupts) as pool:
        try:
            with kept_from_children():
                done = pool.map(work, jobs, chunksize=32)
            yield from bar(done)
        except BrokenProcessPool:
            raise NanoVLMError(
                "a drawing process ended early; try again with --workers 1"
            ) from None


def _make_scene(folder: Path, seed: int, job: tuple[str, int]) -> tuple[str, list[dict]]:
    """Draw one scene into its file; return a digest of its pixels and its records."""
    split, index = job
    rng = Random(f"{seed}/{split}/{index}")
    scene = random_scene(rng, SPLITS[split])
    image = draw(scene)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=6)
    name = f"images/{split}/{index:06d}.png"
    (folder / name).write_bytes(buffer.getvalue())
    return hashlib.sha256(image.tobytes()).hexdigest(), _records(scene, rng, split, index, name)


def _records(scene: Scene, rng: Random, split: str, index: int, image: str) -> list[dict]:
    """One record a question; that of the description also holds the objects."""
    records = []
    for number, question in enumerate(questions(scene, rng, SPLITS[split])):
        record = {
            "id": f"{split}/{index:06d}#{number}",
            "image": image,
            "messages": [
                {"role": "user", "content": f"<image>\n{question.text}"},
                {"role": "assistant", "content": question.answer},
            ],
            "kind": question.kind,
        }
        if question.kind == "describe":
            keys = ("shape", "colour", "size", "x", "y")
            objects = [{key: getattr(thing, key) for key in keys} for thing in scene.objects]
            record["objects"] = objects
        records.append(record)
    return records


_PATTERNS_OF_NAMES = (
    *(rf"(?:an? |the )?{colour}(?: object)?" for colour in COLOURS),
    *(rf"(?:an? |the )?{shape}" for shape in SHAPES),
    *COLOURS.values(),
    *SHAPES.values(),
)
_NAMES = re.compile("|".join(_PATTERNS_OF_NAMES), re.IGNORECASE)


def blind_rates(records: Iterable[dict]) -> dict[str, float]:
    """The accuracy, for each kind of question, of the best guess without the image.

    The guess is the most common answer to the wording of a question, with the names of colours and
    shapes removed. Where two objects are named, it is the first or the second, whichever is the
    answer more often.
    """
    answers: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for record in records:
        contents = (message["content"] for message in record["messages"])
        question, answer = (content.removeprefix("<image>\n") for content in contents)
        before, both, _ = question.lower().partition(" or " if " or " in question else "和")
        if both and _NAMES.match(answer):
            answer = "the first" if answer.lower().rstrip("。.") in before else "the second"
        answers[record["kind"], _NAMES.sub("", question)][answer] += 1
    right, total = Counter(), Counter()
    for (kind, _), counter in answers.items():
        right[kind] += counter.most_common(1)[0][1]
        total[kind] += counter.total()
    return {kind: round(right[kind] / total[kind], 3) for kind in KINDS if total[kind]}


def summary(world: dict) -> str:
    """A table of the number of questions of each kind and the accuracy of a blind guess."""
    lines = [f"{'questions':<16}" + "".join(f"{split:>8}" for split in SPLITS) + "   blind guess"]
    for kind, rate in world["blind"].items():
        counts = "".join(f"{world['questions'][split].get(kind, 0):>8}" for split in SPLITS)
        lines.append(f"{kind:<16}{counts}{rate:>13.1%}")
    totals = "".join(f"{sum(world['questions'][split].values()):>8}" for split in SPLITS)
    lines.append(f"{'all':<16}{totals}")
    lines.append("held out for novel: " + ", ".join(" ".join(pair) for pair in world["held_out"]))
    return "\n".join(lines)


def main() -> None:
    """Read the flags and make the data."""
    parser = CommandParser(description="Draw the toy world: 64×64 scenes and questions about them.")
    data = parser.add_argument_group("data")
    data.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder to make (%(default)s)")
    data.add_argument("--scenes", type=int, default=8000, help="training scenes (%(default)s)")
    data.add_argument(
        "--eval-scenes", type=int, default=600, help="scenes of val, and of novel (%(default)s)"
    )
    data.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same bytes (%(default)s)"
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--workers", type=int, default=0, help="processes; 0 uses all cores (%(default)s)"
    )
    make_scenes(**vars(parser.parse_args()))


if __name__ == "__main__":
    run_command(main)
