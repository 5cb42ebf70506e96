"""What answers cost: few bits a weight, conversations that keep their cache, many at once."""

import gc
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from nanovlm.bench.limits import READ
from nanovlm.bench.models import IMAGE_SIZE, BenchModel, NanoVLMModel
from nanovlm.bench.tasks import NEW_TOKENS, VISUAL_TOKENS, Bench
from nanovlm.data.collate import prepare
from nanovlm.engine.answering import EncodedRequest, Request, answer_together, encode_request
from nanovlm.engine.conversation import Conversation
from nanovlm.engine.weight_only import KINDS, quantize_for_answers
from nanovlm.generate import compile_decoding, generate
from nanovlm.inputs.batch import Batch
from nanovlm.inputs.chat import IMAGE, Message
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.utils.compiler import require_compiler

TOGETHER = 16
AGREEMENT = 40  # greedy tokens that are compared
QUESTIONS = (
    "请用一句话介绍北京。",
    "为什么天空是蓝色的？",
    "写一首关于春天的短诗。",
    "用 Python 写一个函数，判断一个数是不是素数。",
    "Explain photosynthesis to a child in three sentences.",
    "What is the capital of Australia, and how large is it?",
    "Translate into Chinese: The dog runs across the lawn.",
    "List five animals that live in the sea.",
)
Figures = dict[str, Any]


def measure(weights: Path, bench: Bench, rounds: int, compiled: bool = False) -> Figures:
    """All figures: the best of `rounds` measurements in turn, and one of what does not vary.

    With `compiled`, decoding is measured once more with compiled steps.
    """
    if compiled:
        require_compiler(bench.device)
    models: dict[str, BenchModel] = {}
    if importlib.util.find_spec("transformers") is not None:
        from nanovlm.bench.transformers_model import TransformersModel  # may not be installed

        models["transformers"] = TransformersModel(
            weights, bench.device, bench.dtype, bench.image_token_id
        )
    for compiling in (False, True) if compiled else (False,):
        for kind in ("", *KINDS):
            ours = NanoVLMModel(weights, bench.device, bench.dtype, bench.image_token_id)
            if kind:
                quantize_for_answers(ours.model.language_model, kind, bench.dtype)
            if compiling:
                compile_decoding(ours.model.language_model)
            models[f"{kind or 'nanovlm'}{', compiled' if compiling else ''}"] = ours
    plain = models["nanovlm"]
    assert isinstance(plain, NanoVLMModel)
    figures: Figures = {
        "decode": _decoding(models, bench, rounds),
        "second_turn": _second_turn(plain.model, rounds),
        "together": _together(plain.model, rounds),
    }
    answers = {name: _answers(model) for name, model in models.items() if name != "transformers"}
    for name, given in answers.items():
        figures["decode"][name]["agreement"] = _agreement(given, answers["nanovlm"])
    return figures


def _decoding(models: dict[str, BenchModel], bench: Bench, rounds: int) -> Figures:
    """Tokens/s of each model, the bytes that a token reads, and its share of the reading speed."""
    tasks = {name: bench.generate(model) for name, model in models.items()}
    values = torch.ones(READ // 4, device=bench.device)
    reads, speeds = [], {name: [] for name in models}
    for turn in tqdm(range(-1, rounds), desc="decoding", unit="round", leave=False):
        read = READ / bench.seconds(values.sum)
        measured = {name: task()["decode"] for name, task in tasks.items()}
        if turn >= 0:  # after the warm-up
            reads.append(read)
            for name, speed in measured.items():
                speeds[name].append(speed)
    figures: Figures = {}
    for name, model in models.items():
        figures[name] = {"tokens_per_second": max(speeds[name])}
        if isinstance(model, NanoVLMModel):
            size = bytes_of(model.model.language_model)
            shares = (size * speed / read for speed, read in zip(speeds[name], reads))
            figures[name] |= {"bytes": size, "share_of_reading": max(shares)}
    return figures


def bytes_of(language_model: nn.Module) -> int:
    """Of all weights, which a token reads once; the embedding table counts as the output head."""
    held = (*language_model.parameters(), *language_model.buffers())
    return sum(tensor.nbytes for tensor in held)


def _second_turn(model: VisionLanguageModel, rounds: int) -> Figures:
    """Seconds to the first token of a second turn: everything read again, or what is new alone."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (90, 120, 60))
    talk = [Message("user", (IMAGE, "\n", "描述图片"))]
    again, kept = [], []
    for turn in range(-1, rounds):
        conversation = Conversation(model)
        answer = conversation.generate(_batch(model, talk, image), 16)
        text = model.tokenizer.decode(answer)
        asked = [*talk, Message("assistant", (text,)), Message("user", ("还有什么？",))]
        batch = _batch(model, asked, image)
        times = (
            _seconds(lambda batch=batch: generate(model, batch, 1)),
            _seconds(lambda batch=batch, talk=conversation: talk.generate(batch, 1)),
        )
        if turn >= 0:
            again.append(times[0])
            kept.append(times[1])
    return {"read_again": min(again), "kept": min(kept)}


def _together(model: VisionLanguageModel, rounds: int) -> Figures:
    """Requests one after the other and together: tokens/s while decoding, and seconds in all."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (90, 120, 60))
    asked = [
        (f"{number}. {QUESTIONS[number % len(QUESTIONS)]}", number % 2 == 0)
        for number in range(TOGETHER)
    ]
    requests = []
    for text, sees in asked:
        content = (IMAGE, "\n", text) if sees else (text,)
        request = Request([Message("user", content)], [image] if sees else [], NEW_TOKENS)
        requests.append(encode_request(model, request))
    figures: Figures = {}
    stop_ids, model.chat.stop_ids = model.chat.stop_ids, {-1}  # all are as long
    for name, size in (("one_by_one", 1), ("together", TOGETHER)):
        groups = [requests[start : start + size] for start in range(0, TOGETHER, size)]
        best = [_answer_groups(model, groups) for _ in range(1 + rounds)][1:]
        figures[name] = {
            "tokens_per_second": max(speed for speed, _ in best),
            "seconds": min(seconds for _, seconds in best),
        }
    model.chat.stop_ids = stop_ids
    return figures


def _answer_groups(
    model: VisionLanguageModel, groups: list[list[EncodedRequest]]
) -> tuple[float, float]:
    """Tokens/s after the first of each answer, and seconds in all."""
    start, decoding = time.perf_counter(), 0.0
    for group in groups:
        times: list[float] = []
        group[0].request.on_text = lambda _, times=times: times.append(time.perf_counter())
        answer_together(model, group)
        decoding += times[-1] - times[0]
    tokens = sum(map(len, groups)) * (NEW_TOKENS - 1)
    return tokens / decoding, time.perf_counter() - start


def _answers(model: BenchModel) -> list[list[int]]:
    assert isinstance(model, NanoVLMModel)
    questions = ([Message("user", (question,))] for question in QUESTIONS)
    return [generate(model.model, _batch(model.model, each), AGREEMENT)[0] for each in questions]


def _agreement(answers: list[list[int]], plain: list[list[int]]) -> float:
    """How many tokens of an answer, of AGREEMENT, are those of the plain model up to the first
    other one; on average."""
    equal = []
    for given, expected in zip(answers, plain):
        pairs = enumerate(zip(given, expected))
        different = (place for place, (one, other) in pairs if one != other)
        equal.append(next(different, min(len(given), len(expected))) / len(expected))
    return sum(equal) / len(equal)


def _batch(model: VisionLanguageModel, messages: list[Message], *images: Image.Image) -> Batch:
    batch = prepare(model, [messages], [images], add_generation_prompt=True)
    return batch.to(next(model.parameters()).device)


def _seconds(function: Callable[[], object]) -> float:
    gc.collect()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def table(figures: Figures) -> str:
    """The figures as lines of text."""
    plain = figures["decode"]["nanovlm"]
    lines = [
        f"{'decoding, 64 tokens':24} {'tokens/s':>9} {'×':>6} {'GB':>6} {'of reading':>11} equal"
    ]
    for name, row in figures["decode"].items():
        speed = row["tokens_per_second"]
        line = f"{name:24} {speed:9.1f} {speed / plain['tokens_per_second']:6.2f}"
        if "bytes" in row:
            line += f" {row['bytes'] / 1e9:6.3f} {row['share_of_reading']:11.0%}"
            line += f" {row['agreement']:5.0%}"
        lines.append(line)
    again, kept = (figures["second_turn"][name] for name in ("read_again", "kept"))
    lines.append(
        f"first token of a second turn, {VISUAL_TOKENS} visual tokens: read again {again:.3f} s, "
        f"from the cache {kept:.3f} s, {again / kept:.1f}×"
    )
    one, many = (figures["together"][name] for name in ("one_by_one", "together"))
    lines.append(
        f"{TOGETHER} requests of {NEW_TOKENS} tokens, half with an image: one by one "
        f"{one['tokens_per_second']:.1f} tokens/s and {one['seconds']:.1f} s in all, together "
        f"{many['tokens_per_second']:.1f} and {many['seconds']:.1f}; "
        f"{many['tokens_per_second'] / one['tokens_per_second']:.1f}× and "
        f"{one['seconds'] / many['seconds']:.1f}×"
    )
    return "\n".join(lines)
