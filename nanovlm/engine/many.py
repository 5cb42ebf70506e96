"""A file of answers for a folder of images or a file of questions: `infer.py --batch`."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanovlm.data.forms import QUESTIONS, TURN_LISTS, present, read_conversation
from nanovlm.data.records import MAX_NAMED, image_path, read_entries
from nanovlm.engine.answering import EncodedRequest, Request, answer_together, encode_request
from nanovlm.errors import NanoVLMError
from nanovlm.inputs.chat import IMAGE, Message
from nanovlm.inputs.image import open_image
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.sampling import Sampling
from nanovlm.utils.console import say
from nanovlm.utils.files import read_json, to_jsonl, write_atomically, write_json
from nanovlm.utils.outputs import check_new_file, only_writer, write_new

AT_ONCE = 16  # questions that are answered together
SORTED = 4  # batches whose questions are sorted by length
ANSWERS, SETTINGS = "answers.jsonl", "settings.json"  # of a call that is not at its end
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass
class Question:
    """A line of the file of answers, before it is answered."""

    where: str  # the file of the image, or the file and line of the record
    images: list[str]  # as the source names them
    paths: list[Path]
    messages: tuple[Message, ...]
    problem: str = ""  # why it cannot be answered


def read_questions(source: Path, prompt: str | None) -> list[Question]:
    """The images below a folder, each with `prompt`, or the records of a .json or .jsonl file.

    A record is as for training, with or without an answer; one that has no question takes `prompt`.
    """
    if source.is_dir():
        if not prompt:
            raise NanoVLMError(f"{source}: a folder of images needs a question; give --prompt")
        files = sorted(path for path in source.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        names = [path.relative_to(source).as_posix() for path in files]
        asked = (Message("user", (IMAGE, "\n", prompt)),)
        questions = [Question(name, [name], [path], asked) for name, path in zip(names, files)]
    else:
        questions = [
            _read_question(where, entry, source.parent, prompt)
            for where, entry in read_entries(source)
        ]
    if not questions:
        what = "images" if source.is_dir() else "records"
        raise NanoVLMError(f"{source}: holds no {what}")
    return questions


def _read_question(where: str, entry: Any, folder: Path, prompt: str | None) -> Question:
    question = Question(where, [], [], ())
    try:
        if isinstance(entry, NanoVLMError):
            raise entry
        if not isinstance(entry, dict):
            raise NanoVLMError(f"is a JSON {type(entry).__name__}, expected an object")
        entry = present(entry)
        if not any(key in entry for key in (*TURN_LISTS, *QUESTIONS)):
            if not prompt:
                raise NanoVLMError("has no question; give one for all such records with --prompt")
            entry = {**entry, "query": prompt}
        messages, question.images = read_conversation(entry)
        question.paths = [image_path(name, folder) for name in question.images]
        question.messages = messages[:-1] if messages[-1].role == "assistant" else messages
    except NanoVLMError as error:
        question.problem = str(error)
    return question


def answer_all(
    model: VisionLanguageModel,
    questions: Sequence[Question],
    out: Path,
    max_new_tokens: int,
    sampling: Sampling,
) -> None:
    """Answer all questions and write `out`: a JSON object a line, in the order of the questions.

    {"where", "images", "answer"}, or "error" in place of "answer". Until all are answered, those
    that are lie in a folder beside `out`, from which the same call goes on after it was broken off.
    """
    check_new_file(out, "--out", [path for question in questions for path in question.paths])
    folder = out.with_name(f"{out.name}.partial")
    with only_writer(folder, "--out"):
        settings = {"max_new_tokens": max_new_tokens, **dataclasses.asdict(sampling)}
        done = _begun(folder, {**settings, "questions": _digest(questions)})
        if done:
            say(f"{folder}: holds {len(done)} of {len(questions)} answers; going on after them")
        rest = [question for question in questions if question.where not in done]
        total, first = len(questions), len(done)
        with open(folder / ANSWERS, "a", encoding="utf-8") as file:
            answers = _answers(model, rest, max_new_tokens, sampling)
            bar = tqdm(answers, "answering", total, initial=first, unit="question")
            for line in bar:
                file.write(to_jsonl([line]))
                file.flush()
                done[line["where"]] = line
        write_new(out, to_jsonl(done[question.where] for question in questions))
        for name in (ANSWERS, SETTINGS):
            (folder / name).unlink()
    with contextlib.suppress(OSError):  # only_writer has deleted one that it made
        folder.rmdir()
    failed = [line for line in done.values() if "error" in line]
    for line in failed[:MAX_NAMED]:
        say(f"not answered: {line['where']}: {line['error']}")
    if failed:
        say(f"not answered: {len(failed)} of {len(questions)}; {out} has the reasons")


def _begun(folder: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The answers of an earlier call that was broken off, by their places; at first none."""
    path = folder / SETTINGS
    if not path.exists():
        write_json(path, settings)
        return {}
    if read_json(path) != settings:
        raise NanoVLMError(
            f"{folder}: holds answers to other questions, or with other flags, from a call that "
            "was broken off; delete it, or name another file with --out"
        )
    answers = folder / ANSWERS
    text = answers.read_text(encoding="utf-8") if answers.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # a last line that was cut is answered again
    if whole != text:
        write_atomically(answers, whole)
    return {line["where"]: line for line in map(json.loads, whole.splitlines())}


def _digest(questions: Sequence[Question]) -> str:
    asked = repr([(question.where, question.images, question.messages) for question in questions])
    return hashlib.sha256(asked.encode()).hexdigest()


def _answers(
    model: VisionLanguageModel,
    questions: Sequence[Question],
    max_new_tokens: int,
    sampling: Sampling,
) -> Iterator[dict[str, Any]]:
    """A line of the file for each question; those of some batches are sorted by length."""
    for start in range(0, len(questions), AT_ONCE * SORTED):
        encoded: list[tuple[Question, EncodedRequest]] = []
        for question in questions[start : start + AT_ONCE * SORTED]:
            try:
                if question.problem:
                    raise NanoVLMError(question.problem)
                images = [open_image(path) for path in question.paths]
                request = Request(question.messages, images, max_new_tokens, sampling)
                encoded.append((question, encode_request(model, request)))
            except NanoVLMError as error:
                yield {**_place(question), "error": str(error)}
        encoded.sort(key=lambda pair: len(pair[1]))
        for first in range(0, len(encoded), AT_ONCE):
            part = encoded[first : first + AT_ONCE]
            answers = answer_together(model, [request for _, request in part])
            for (question, _), answer in zip(part, answers):
                yield {**_place(question), "answer": answer.text.strip()}


def _place(question: Question) -> dict[str, Any]:
    return {"where": question.where, "images": question.images}
