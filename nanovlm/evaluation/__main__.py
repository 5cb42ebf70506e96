"""Score a model on records, and the same with the image taken away.

    python -m nanovlm.evaluation --model runs/stage2/model --data data/scenes/val.jsonl

prints one JSON line: {"exact": …, "cider_d": …, "bleu_4": …, "n": …}. Progress and the share of
exact answers for each `kind` of record go to stderr. Records of kind "describe" add the rates of
wrong objects, {"chair_i": …, "chair_s": …}. `--control blind` and `--control shuffled` take the
image away.

Lesson: lessons/source/17_measuring.py.
"""

import json
from collections import defaultdict
from pathlib import Path

from tqdm import tqdm

from nanovlm.data.records import Record, read_records, record_files, say_skipped
from nanovlm.errors import NanoVLMError
from nanovlm.evaluation.answers import CONTROLS, answer_records, references_of
from nanovlm.evaluation.metrics import (
    bleu,
    cider_d,
    exact_match,
    same_items,
    tokenize,
    wrong_objects,
)
from nanovlm.generate import compile_decoding
from nanovlm.hub.models import load_model
from nanovlm.utils.console import run_command, say
from nanovlm.utils.device import add_compile_flag, add_machine_flags, choose_device, choose_dtype
from nanovlm.utils.files import to_jsonl
from nanovlm.utils.outputs import check_new_file, write_new
from nanovlm.utils.parser import CommandParser, expand_user


def main() -> None:
    """Read the flags, answer, score, print."""
    arguments = _parser().parse_args()
    if arguments.limit < 0 or arguments.batch_size < 1 or arguments.max_new_tokens < 1:
        raise NanoVLMError("--limit, --batch-size and --max-new-tokens have to be above 0")
    if arguments.answers:
        inputs = (arguments.model, *record_files(arguments.data))
        check_new_file(arguments.answers, "--answers", inputs)
    records, skipped = read_records(arguments.data, arguments.images)
    say_skipped(skipped, len(records) + len(skipped))
    records = records[: arguments.limit or None]
    device = choose_device(arguments.device)
    dtype, why = choose_dtype(arguments.dtype, device)
    model = load_model(arguments.model, dtype).to(device)
    if arguments.compile:
        compile_decoding(model.language_model)
    say(f"model: {arguments.model}" + (f" ({why})" if why else ""))
    stream = answer_records(
        model, records, arguments.max_new_tokens, arguments.batch_size, arguments.control
    )
    name = f"answering ({arguments.control} control)"
    progress = tqdm(stream, name, len(records), unit="question", dynamic_ncols=True)
    answered = [pair for pair in zip(records, list(progress)) if pair[1] is not None]
    if num_skipped := len(records) - len(answered):
        say(f"skipped: {num_skipped} of {len(records)} records, which do not count")
    if not answered:
        raise NanoVLMError(f"{arguments.data}: no record could be answered, for the reasons above")
    records, answers = map(list, zip(*answered))
    if arguments.answers:
        lines = (
            {"where": record.where, "answer": answer, "references": references_of(record)}
            for record, answer in answered
        )
        write_new(arguments.answers, to_jsonl(lines))
    print(json.dumps(score(records, answers)))


def score(records: list[Record], answers: list[str]) -> dict[str, float]:
    """Exact match, CIDEr-D and BLEU-4 over all records; exact matches of each `kind` go to stderr.

    A record of kind "describe" counts as exact when it names the same things as a reference, in any
    order.
    """
    exact: dict[str, list[bool]] = defaultdict(list)
    for record, answer in zip(records, answers):
        kind = str(record.extra.get("kind", ""))
        right = same_items if _is_description(record) else exact_match
        exact[kind].append(right(answer, references_of(record)))
    for kind, outcomes in sorted(exact.items()):
        if kind:
            say(f"{kind:16} {sum(outcomes) / len(outcomes):7.2%} of {len(outcomes)}")
    described = [
        (answer, references_of(record))
        for record, answer in zip(records, answers)
        if _is_description(record)
    ]
    chair = wrong_objects(*map(list, zip(*described))) if described else {}
    if chair:
        say(
            f"of the objects named in descriptions {chair['chair_i']:.2%} are wrong; "
            f"{chair['chair_s']:.2%} of descriptions name a wrong one"
        )
    tokens = [tokenize(answer) for answer in answers]
    reference_tokens = [[tokenize(text) for text in references_of(record)] for record in records]
    outcomes = [outcome for group in exact.values() for outcome in group]
    return {
        "exact": round(sum(outcomes) / len(outcomes), 6),
        "cider_d": round(cider_d(tokens, reference_tokens), 6),
        "bleu_4": round(bleu(tokens, reference_tokens), 6),
        **{name: round(rate, 6) for name, rate in chair.items()},
        "n": len(records),
    }


def _is_description(record: Record) -> bool:
    return record.extra.get("kind") == "describe"


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m nanovlm.evaluation",
        description="Score a model on records, and the same with the image taken away.",
    )
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="model folder, such as runs/stage2/model",
    )
    parser.add_argument(
        "--data",
        type=expand_user,
        required=True,
        metavar="FILE",
        help="records, .json or .jsonl: a file, several with commas, or a pattern in quotes",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder of the images (default: the records' folder)",
    )
    parser.add_argument(
        "--limit", type=int, default=0, metavar="N", help="take the first N records only"
    )
    parser.add_argument(
        "--control", choices=CONTROLS, default="none", help="blank the images, or swap them"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="longest answer (default: 64)"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=32,
        metavar="N",
        help="questions answered at once (default: 32)",
    )
    parser.add_argument(
        "--answers",
        type=Path,
        metavar="FILE",
        help="also write every answer here, one JSON object a line",
    )
    add_machine_flags(parser)
    add_compile_flag(parser)
    return parser


if __name__ == "__main__":
    run_command(main)
