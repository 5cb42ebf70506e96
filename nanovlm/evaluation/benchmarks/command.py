"""`python -m nanovlm.evaluation --benchmark NAME`: ask a benchmark's questions and score them."""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from nanovlm.data.records import check_skipped, say_skipped
from nanovlm.errors import NanoVLMError, quoted
from nanovlm.evaluation.answers import answer_records
from nanovlm.evaluation.benchmarks import mmbench, mmstar, pope
from nanovlm.evaluation.benchmarks.likelihood import rank_choices
from nanovlm.evaluation.benchmarks.questions import Question
from nanovlm.evaluation.benchmarks.scores import COLUMNS, score_benchmark, table
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.utils.console import say
from nanovlm.utils.files import to_jsonl
from nanovlm.utils.outputs import write_new

BENCHMARKS = {"pope": pope, "mmbench": mmbench, "mmstar": mmstar}
WAYS = ("likelihood", "generation")
EXAMPLES = 5  # answers that could not be read and are shown


def add_benchmark_flags(parser: argparse.ArgumentParser) -> None:
    """Give the parser of the command the flags of benchmarks."""
    parser.add_argument(
        "--benchmark",
        choices=BENCHMARKS,
        help="--data is a published file of this benchmark; its score with the image, blind and "
        "shuffled",
    )
    parser.add_argument(
        "--by",
        choices=WAYS,
        help="with --benchmark: take the likeliest choice, or read the answer that is written "
        "(default: likelihood)",
    )


def check_benchmark_flags(arguments: argparse.Namespace) -> None:
    """Refuse flags that say nothing with, or without, `--benchmark`; give `--by` its default."""
    if not arguments.benchmark:
        if arguments.by:
            raise NanoVLMError("--by is for --benchmark; name one, or leave it out")
        return
    arguments.by = arguments.by or WAYS[0]
    for flag, given, reason in (
        ("--loss", arguments.loss, "a benchmark is answered"),
        ("--gallery", arguments.gallery, "a gallery is of records"),
        ("--beams", arguments.beams > 1, "a benchmark is answered greedily"),
        ("--compile", arguments.compile and arguments.by == "likelihood",
         "a likelihood takes one pass"),
        ("--control", arguments.control != "none", "a benchmark is always asked with all controls"),
        ("--images", arguments.images and arguments.benchmark != "pope",
         f"the images of {arguments.benchmark} stand in its table"),
    ):  # fmt: skip
        if given:
            raise NanoVLMError(f"{reason}; leave out {flag} or --benchmark")


def read_benchmark(arguments: argparse.Namespace) -> list[Question]:
    """The questions of `--benchmark` that can be asked; those that cannot are named on stderr."""
    benchmark = BENCHMARKS[arguments.benchmark]
    questions, skipped = benchmark.read(arguments.data, arguments.images, arguments.limit)
    check_skipped(skipped, len(questions) + len(skipped))
    say_skipped(skipped, len(questions) + len(skipped))
    return questions


def run_benchmark(
    model: VisionLanguageModel, questions: Sequence[Question], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Ask all questions with the image, blind and shuffled, and score them.

    A question that cannot be asked in one of the three ways does not count in any.
    """
    benchmark = BENCHMARKS[arguments.benchmark]
    answers = {column: list(_ask(model, questions, arguments, column)) for column in COLUMNS}
    failed = {
        question.unit
        for number, question in enumerate(questions)
        if any(answers[column][number] is None for column in COLUMNS)
    }
    if failed:
        units = {question.unit for question in questions}
        say(f"skipped: {len(failed)} of {len(units)} questions, which do not count")
    kept = [n for n, question in enumerate(questions) if question.unit not in failed]
    if not kept:
        raise NanoVLMError(f"{arguments.data}: no question could be asked, for the reasons above")
    questions = [questions[n] for n in kept]
    given = {column: [str(answers[column][n]) for n in kept] for column in COLUMNS}
    chosen, unread = {}, {}
    for column, texts in given.items():
        if arguments.by == "likelihood":
            chosen[column] = [each.choices.index(text) for each, text in zip(questions, texts)]
        else:
            chosen[column] = [benchmark.parse(*pair) for pair in zip(questions, texts)]
            unread[column] = _unread(benchmark, chosen[column], texts)
    if unread:
        _tell_unread(questions, given["image"], unread)
    if arguments.answers:
        write_new(arguments.answers, to_jsonl(_lines(questions, given, chosen)))
    scores = score_benchmark(benchmark, questions, chosen)
    say(*table(scores, benchmark.METRICS))
    counted = {"unread": {column: len(places) for column, places in unread.items()}}
    return {
        "benchmark": arguments.benchmark,
        "by": arguments.by,
        **(counted if unread else {}),
        **scores,
    }


def _ask(
    model: VisionLanguageModel,
    questions: Sequence[Question],
    arguments: argparse.Namespace,
    column: str,
) -> Iterator[str | None]:
    """What each question is answered with; by likelihood, the choice itself."""
    records, control = [question.record for question in questions], COLUMNS[column]
    name = "with the image" if column == "image" else f"{column} control"
    bar = tqdm(desc=name, total=len(records), unit="question", dynamic_ncols=True)
    with bar:
        if arguments.by == "generation":
            limits = arguments.max_new_tokens, arguments.batch_size
            for answer in answer_records(model, records, *limits, control):
                bar.update()
                yield answer
            return
        ranked = rank_choices(model, records, arguments.batch_size, control)
        for question, scores in zip(questions, ranked):
            bar.update()
            yield None if scores is None else question.choices[scores.index(max(scores))]


def _unread(benchmark: Any, chosen: Sequence[int | None], texts: Sequence[str]) -> list[int]:
    """The places of the answers that say nothing to the benchmark's own matching."""
    if benchmark is pope:
        return [n for n, text in enumerate(texts) if pope.says_neither(text)]
    return [n for n, choice in enumerate(chosen) if choice is None]


def _tell_unread(
    questions: Sequence[Question], texts: Sequence[str], unread: dict[str, list[int]]
) -> None:
    for n in unread["image"][:EXAMPLES]:
        say(f"not read: {questions[n].record.where}: {quoted(texts[n])}")
    counts = ", ".join(f"{len(places)} {column}" for column, places in unread.items())
    meaning = (
        "says neither yes nor no and counts as yes"
        if questions[0].choices == pope.CHOICES
        else ("chooses no option and is wrong")
    )
    say(f"not read: {counts} of {len(questions)} answers each; such an answer {meaning}")


def _lines(
    questions: Sequence[Question], given: dict[str, list[str]], chosen: dict[str, list[int | None]]
) -> Iterator[dict[str, Any]]:
    for number, question in enumerate(questions):
        yield {
            "where": question.record.where,
            "question": question.record.messages[0].text.strip(),
            "right": question.record.references[0],
            **{column: texts[number] for column, texts in given.items()},
            "correct": {
                column: places[number] == question.right for column, places in chosen.items()
            },
        }
