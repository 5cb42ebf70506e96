"""Hold a model's explanations to account: blank the patches, and see what becomes of the words.

    python -m nanovlm.explain --model runs/stage2/model --data data/scenes/val.jsonl --limit 100

answers the records, explains the answers and prints one JSON line of means over the words whose
probability the images at least double: {"top": …, "random": …, "other": …, "won": …, "words": …,
"n": …}. `top` is how far the log-probability of a word falls, in nats, when the tenth of the
patches with the largest parts in it is blanked, `random` when as many random ones are, `other` when
those of another word of the answer are; `won` is the share of words that fall further without
their own patches than without random ones.

`python infer.py IMAGE PROMPT --explain out.png` draws one explanation.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm

from nanovlm.data.collate import prepare
from nanovlm.data.records import Record, add_records_flags, read_records, say_skipped
from nanovlm.engine.loading import add_model_flags, add_named_folder_flag, load_for_answers
from nanovlm.errors import NanoVLMError
from nanovlm.explain.attribution import refuse_few_bits
from nanovlm.explain.blanking import Drop, blanking_drops
from nanovlm.generate import generate
from nanovlm.inputs.chat import Message
from nanovlm.inputs.image import open_image
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.utils.console import run_command
from nanovlm.utils.parser import CommandParser


def main() -> None:
    """Read the flags, measure, print."""
    arguments = _parser().parse_args()
    if arguments.limit < 0 or arguments.max_new_tokens < 1:
        raise NanoVLMError("--limit and --max-new-tokens have to be above 0")
    refuse_few_bits(arguments.quantize)
    records, skipped = read_records(arguments.data, arguments.images)
    say_skipped(skipped, len(records) + len(skipped))
    questions = _questions(records)[: arguments.limit or None]
    if not questions:
        raise NanoVLMError(f"{arguments.data}: no record has an image; give records with images")
    model = load_for_answers(arguments.model, arguments)
    print(json.dumps(_measure(model, questions, arguments.max_new_tokens)))


def _questions(records: list[Record]) -> list[tuple[str, tuple[Path, ...], tuple[Message, ...]]]:
    """Where each question about images is, its images, and the turns up to it; none of them twice.

    A closing assistant turn is the answer of the record, which is not asked for.
    """
    found = {}
    for record in records:
        turns = record.messages
        turns = turns[:-1] if turns[-1].role == "assistant" else turns
        if record.images:
            found.setdefault((record.images, turns), record.where)
    return [(where, *question) for question, where in found.items()]


def _measure(
    model: VisionLanguageModel,
    questions: list[tuple[str, tuple[Path, ...], tuple[Message, ...]]],
    max_new_tokens: int,
) -> dict[str, float | None]:
    """The means over all words; null where there is none to take."""
    drops: list[Drop] = []
    skipped: list[str] = []
    generator = torch.Generator().manual_seed(0)
    for where, paths, turns in tqdm(questions, "explaining", unit="answer", dynamic_ncols=True):
        try:
            images = [open_image(path) for path in paths]
            prompt = prepare(model, [turns], [images], add_generation_prompt=True)
            prompt = prompt.to(next(model.parameters()).device)
            (answer,) = generate(model, prompt, max_new_tokens)
            drops += blanking_drops(model, prompt, images, answer, generator)
        except NanoVLMError as error:
            skipped.append(f"{where}: {error}")
    say_skipped(skipped, len(questions))
    if not drops:
        raise NanoVLMError("the images double the probability of no word of the answers")
    figures = {
        "top": fmean(drop.top for drop in drops),
        "random": fmean(drop.random for drop in drops),
        "other": _mean_of(drop.other for drop in drops),
        "won": fmean(drop.top > drop.random for drop in drops),
    }
    rounded = {name: None if mean is None else round(mean, 4) for name, mean in figures.items()}
    return {**rounded, "words": len(drops), "n": len(questions) - len(skipped)}


def _mean_of(values: Iterator[float]) -> float | None:
    """The mean of those that are numbers; None if none is."""
    numbers = [value for value in values if not math.isnan(value)]
    return fmean(numbers) if numbers else None


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m nanovlm.explain",
        description="Blank the patches that words of answers came from, and see how far the words' "
        "log-probability falls. `infer.py --explain` draws one explanation.",
    )
    add_named_folder_flag(parser)
    add_records_flags(parser)
    parser.add_argument(
        "--limit", type=int, default=0, metavar="N", help="ask the first N questions only"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="longest answer (default: 64)"
    )
    add_model_flags(parser)
    return parser


if __name__ == "__main__":
    run_command(main)
