"""Score a model on records, and the same with the image taken away.

    python -m nanovlm.evaluation --model runs/stage2/model --data data/scenes/val.jsonl

prints one JSON line: {"exact": …, "cider_d": …, "bleu_4": …, "n": …}. Progress and the share of
exact answers for each `kind` of record go to stderr. Records of kind "describe" add the rates of
wrong objects, {"chair_i": …, "chair_s": …}. `--control blind` and `--control shuffled` take the
image away. `--gallery out.html` also writes a page with every image, question and answer.

With `--benchmark pope`, `mmbench` or `mmstar`, `--data` is a published file of that benchmark, and
the line holds its scores with the image, blind and shuffled (`nanovlm/evaluation/benchmarks/`).

With `--loss`, nothing is answered. The line is the loss of the answers that the records have, as
the validation of a training run computes it: {"loss": …, "perplexity": …, "tokens": …, "n": …}.

Lesson: lessons/source/17_measuring.py.
"""

import argparse
import json
import math
import os
from collections import defaultdict
from pathlib import Path

from tqdm import tqdm

from nanovlm.data.records import Record, add_records_flags, read_records, record_files, say_skipped
from nanovlm.engine.loading import add_model_flags, add_named_folder_flag, load_for_answers
from nanovlm.errors import NanoVLMError
from nanovlm.evaluation.answers import (
    CONTROLS,
    answer_records,
    is_description,
    is_right,
    references_of,
)
from nanovlm.evaluation.benchmarks.command import (
    add_benchmark_flags,
    check_benchmark_flags,
    read_benchmark,
    run_benchmark,
)
from nanovlm.evaluation.gallery import draw_gallery
from nanovlm.evaluation.loss import Loss, measure_loss
from nanovlm.evaluation.metrics import bleu, cider_d, tokenize, wrong_objects
from nanovlm.generate import check_not_compiled
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.sampling import Sampling, add_beam_flags
from nanovlm.utils.console import run_command, say
from nanovlm.utils.files import to_jsonl
from nanovlm.utils.outputs import check_new_file, new_file, write_new
from nanovlm.utils.parser import CommandParser


def main() -> None:
    """Read the flags, answer or compute the loss, score, print."""
    arguments = _parser().parse_args()
    numbers = (arguments.batch_size, arguments.max_new_tokens, arguments.max_length)
    if arguments.limit < 0 or min(numbers) < 1:
        raise NanoVLMError(
            "--limit, --batch-size, --max-new-tokens and --max-length have to be above 0"
        )
    if arguments.answers and arguments.gallery and _is_same(arguments.answers, arguments.gallery):
        raise NanoVLMError("--answers and --gallery name one file; name two")
    sampling = Sampling(beams=arguments.beams, length_penalty=arguments.length_penalty)
    check_not_compiled(sampling, arguments.compile)
    if arguments.loss and arguments.beams > 1:
        raise NanoVLMError("--loss answers nothing; leave out --beams or --loss")
    check_benchmark_flags(arguments)
    for flag, path in (("--answers", arguments.answers), ("--gallery", arguments.gallery)):
        if path and arguments.loss:
            raise NanoVLMError(f"--loss answers nothing; leave out {flag} or --loss")
        if path:
            check_new_file(path, flag, (arguments.model, *record_files(arguments.data)))
    if arguments.benchmark:
        questions = read_benchmark(arguments)
        model = load_for_answers(arguments.model, arguments)
        print(json.dumps(run_benchmark(model, questions, arguments)))
        return
    records, skipped = read_records(arguments.data, arguments.images)
    say_skipped(skipped, len(records) + len(skipped))
    records = records[: arguments.limit or None]
    model = load_for_answers(arguments.model, arguments)
    if arguments.loss:
        print(json.dumps(_tell_loss(model, records, arguments)))
        return
    _answer_and_score(model, records, arguments, sampling)


def _tell_loss(
    model: VisionLanguageModel, records: list[Record], arguments: argparse.Namespace
) -> dict[str, float | None]:
    """The loss per labelled token of the records with answers; null where it is not finite."""
    asked = [record for record in records if not record.references]
    if without := len(records) - len(asked):
        say(f"skipped: {without} of {len(records)} records, which have references and no answer")
    if not asked:
        raise NanoVLMError(
            f"{arguments.data}: no record has an answer, whose loss could be computed; give "
            "records as training reads them, or leave out --loss"
        )
    flags = arguments.control, arguments.batch_size, arguments.max_length
    loss, skipped, cut = Loss(0.0, 0, 0), [], 0
    name = f"computing the loss{_control_of(arguments)}"
    with tqdm(desc=name, total=len(asked), unit="record", dynamic_ncols=True) as bar:
        for loaded, so_far in measure_loss(model, asked, *flags):
            bar.update(loaded.samples + len(loaded.skipped))
            loss, skipped, cut = so_far, skipped + loaded.skipped, cut + len(loaded.cut)
    say_skipped(skipped, len(asked))
    if cut:
        say(f"cut: {cut} of {len(asked)} records at --max-length {arguments.max_length} tokens")
    if not loss.tokens:
        raise NanoVLMError(f"{arguments.data}: no record could be used, for the reasons above")
    figures = {"loss": loss.mean, "perplexity": loss.perplexity}
    finite = {key: value if math.isfinite(value) else None for key, value in figures.items()}
    return {**finite, "tokens": loss.tokens, "n": loss.records}


def _answer_and_score(
    model: VisionLanguageModel,
    records: list[Record],
    arguments: argparse.Namespace,
    sampling: Sampling,
) -> None:
    """Print the scores of the answers, which `--answers` and `--gallery` write to files as well."""
    flags = arguments.max_new_tokens, arguments.batch_size, arguments.control
    stream = answer_records(model, records, *flags, sampling)
    name = f"answering{_control_of(arguments)}"
    progress = tqdm(stream, name, len(records), unit="question", dynamic_ncols=True)
    pairs = zip(records, list(progress))
    answered = [(record, answer) for record, answer in pairs if answer is not None]
    if num_skipped := len(records) - len(answered):
        say(f"skipped: {num_skipped} of {len(records)} records, which do not count")
    if not answered:
        raise NanoVLMError(f"{arguments.data}: no record could be answered, for the reasons above")
    if arguments.answers:
        lines = (
            {"where": record.where, "answer": answer, "references": references_of(record)}
            for record, answer in answered
        )
        write_new(arguments.answers, to_jsonl(lines))
    figures = score([record for record, _ in answered], [answer for _, answer in answered])
    print(json.dumps(figures))
    if arguments.gallery:
        title = f"{arguments.model} · {arguments.data}"
        with new_file(arguments.gallery) as path:
            draw_gallery(path, title, answered, figures, arguments.control)
        say(f"the gallery is in {arguments.gallery}")


def _is_same(first: Path, second: Path) -> bool:
    return os.path.realpath(first) == os.path.realpath(second)


def _control_of(arguments: argparse.Namespace) -> str:
    return "" if arguments.control == "none" else f" ({arguments.control} control)"


def score(records: list[Record], answers: list[str]) -> dict[str, float]:
    """Exact match, CIDEr-D and BLEU-4 over all records; exact matches of each `kind` go to stderr.

    A record of kind "describe" counts as exact when it names the same things as a reference, in any
    order.
    """
    exact: dict[str, list[bool]] = defaultdict(list)
    for record, answer in zip(records, answers):
        exact[str(record.extra.get("kind", ""))].append(is_right(record, answer))
    for kind, outcomes in sorted(exact.items()):
        if kind:
            say(f"{kind:16} {sum(outcomes) / len(outcomes):7.2%} of {len(outcomes)}")
    described = [
        (answer, references_of(record))
        for record, answer in zip(records, answers)
        if is_description(record)
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


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m nanovlm.evaluation",
        description="Score a model on records, and the same with the image taken away.",
    )
    add_named_folder_flag(parser)
    add_records_flags(parser)
    parser.add_argument(
        "--limit",
        type=int,
        default=0,
        metavar="N",
        help="take the first N records only, or questions of each file of a benchmark",
    )
    parser.add_argument(
        "--control", choices=CONTROLS, default="none", help="blank the images, or swap them"
    )
    parser.add_argument(
        "--loss",
        action="store_true",
        help="compute the loss and the perplexity of the records' answers, and answer nothing",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        default=2048,
        metavar="N",
        help="with --loss: tokens of a record; longer text is cut at the end (default: 2048)",
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
    parser.add_argument(
        "--gallery",
        type=Path,
        metavar="FILE.html",
        help="also write a page to look at: images, questions, answers, what is wrong",
    )
    add_beam_flags(parser)
    add_benchmark_flags(parser)
    add_model_flags(parser)
    return parser


if __name__ == "__main__":
    run_command(main)
