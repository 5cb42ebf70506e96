"""Generated answers: the same with and without a cache, alone and in a batch, and equal to those of
`transformers`."""

import contextlib
import copy
import dataclasses
import importlib
import math
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, Qwen2ForCausalLM
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nanovlm.data.collate import collate
from nanovlm.data.sequences import TokenSequence
from nanovlm.errors import NanoVLMError
from nanovlm.generate import Prompt, decode, generate
from nanovlm.hub.models import load_language_model
from nanovlm.inputs.batch import Batch
from nanovlm.inputs.chat import Chat, ImageTokens, Message
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.sampling import Sampling, sample
from nanovlm.tokenizer import Tokenizer, load_tokenizer
from nanovlm.tokenizer.streaming import TextStreamer
from tests.reference.models import byte_pair, qwen, sentence_piece, tiny_vlm

PROMPTS = [
    "<image>描述图片",
    "Hi",
    "What is left of <image>, and what is in <image> below the red circle?",
    "图中有几个红色的圆形？<image>",
]
NEW_TOKENS = 30


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory) -> VisionLanguageModel:
    folder = tmp_path_factory.mktemp("vlm")
    return tiny_vlm(folder, family=request.param, head_dim=12, tie_word_embeddings=False, seed=2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_pair(folder)
    return load_tokenizer(folder)


def prompt_batch(model: VisionLanguageModel, prompts: list[str], pad_left: bool = True) -> Batch:
    """One row a prompt. A prompt has the same random images in every batch."""
    rows, pixels = [], []
    for prompt in prompts:
        row, images = _encode(model, [Message.parse("user", prompt)])
        rows.append(row)
        generator = torch.Generator().manual_seed(len(prompt))
        pixels += [torch.randn(3, 28, 28, generator=generator) for _ in range(images)]
    batch = collate(rows, model.chat.image_token_id, pad_left=pad_left)
    batch.pixels = torch.stack(pixels) if pixels else None
    return batch


def prompt_batch_of(model: VisionLanguageModel, messages: list[Message]) -> Batch:
    """One row, a conversation so far. Its i-th image is the same random one in every batch."""
    row, images = _encode(model, messages)
    batch = collate([row], model.chat.image_token_id, pad_left=True)
    batch.attention_mask = None
    batch.pixels = torch.randn(9, 3, 28, 28, generator=torch.Generator().manual_seed(0))[:images]
    return batch


def _encode(model: VisionLanguageModel, messages: list[Message]) -> tuple[TokenSequence, int]:
    count = sum(message.num_images for message in messages)
    images = [ImageTokens(model.image_length)] * count
    ids = model.chat.encode(messages, images, add_generation_prompt=True).input_ids
    return TokenSequence(ids, [-100] * len(ids), [1] * len(ids), ()), count


def decode_batch(
    model: VisionLanguageModel,
    batch: Batch,
    sampling: Sampling = Sampling(),
    stop_ids: set[int] = frozenset(),
    use_cache: bool = True,
    masked: bool = True,
) -> list[list[int]]:
    """The rows' tokens in NEW_TOKENS steps, -1 after one of `stop_ids`."""
    mask = batch.attention_mask if masked else None
    with torch.inference_mode():
        prompt = Prompt(model.embed(batch), batch.input_ids, mask)
        steps = decode(model.language_model, prompt, NEW_TOKENS, stop_ids, sampling, use_cache)
        return [list(row) for row in zip(*steps)]


def test_cached_uncached_and_batched_answers_are_the_same(model):
    alone = [decode_batch(model, prompt_batch(model, [prompt]))[0] for prompt in PROMPTS]
    num_different = len(set(map(tuple, alone)))
    assert num_different == len(PROMPTS) and all(len(answer) == NEW_TOKENS for answer in alone)
    # Answers that repeat a few tokens could be equal by chance.
    assert all(len(set(answer)) > 5 for answer in alone)
    for prompt, answer in zip(PROMPTS, alone):
        assert decode_batch(model, prompt_batch(model, [prompt]), use_cache=False)[0] == answer
        assert decode_batch(model, prompt_batch(model, [prompt]), masked=False)[0] == answer
    for pad_left in (True, False):
        batch = prompt_batch(model, PROMPTS, pad_left)
        assert (batch.attention_mask == 0).any()
        assert decode_batch(model, batch) == alone
        assert decode_batch(model, batch, use_cache=False) == alone


def test_bfloat16_answers_are_the_same_with_and_without_onednn(model, monkeypatch):
    """oneDNN is switched off for steps of a single token, and for them alone."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    batch = prompt_batch(half, PROMPTS[:1])
    batch.pixels = None if batch.pixels is None else batch.pixels.bfloat16()
    passes, hidden_states = set(), half.language_model.hidden_states

    def recorded(embeddings: Tensor, *rest, **options) -> Tensor:
        passes.add((embeddings.shape[1] == 1, torch.backends.mkldnn.enabled))
        return hidden_states(embeddings, *rest, **options)

    monkeypatch.setattr(half.language_model, "hidden_states", recorded)
    answer = decode_batch(half, batch)
    assert passes == {(False, True), (True, False)} and torch.backends.mkldnn.enabled
    module = importlib.import_module("nanovlm.generate")
    monkeypatch.setattr(module, "_fast_products", lambda *_: contextlib.nullcontext())
    assert decode_batch(half, batch) == answer


@pytest.mark.parametrize("pad_left", [True, False], ids=["left", "right"])
def test_the_repetition_penalty_ignores_tokens_at_padding(model, pad_left):
    sampling = Sampling(repetition_penalty=1.5)
    alone = [decode_batch(model, prompt_batch(model, [prompt]), sampling)[0] for prompt in PROMPTS]
    batch = prompt_batch(model, PROMPTS, pad_left)
    first_tokens = torch.tensor([answer[:1] for answer in alone])
    batch.input_ids = torch.where(batch.attention_mask > 0, batch.input_ids, first_tokens)
    assert decode_batch(model, batch, sampling) == alone


@pytest.mark.parametrize("pad_left", [True, False], ids=["left", "right"])
def test_an_ended_row_gives_no_more_tokens_and_does_not_change_the_others(model, pad_left):
    full = decode_batch(model, prompt_batch(model, PROMPTS))
    stop = full[0][7]
    steps = decode_batch(model, prompt_batch(model, PROMPTS, pad_left), stop_ids={stop})
    ends = [answer.index(stop) if stop in answer else NEW_TOKENS for answer in full]
    assert ends[0] <= 7 and max(ends) > ends[0]
    for row, answer, end in zip(steps, full, ends):
        assert row[:end] == answer[:end] and set(row[end:]) <= {-1}


def test_generate_stops_at_the_end_of_turn(model, monkeypatch):
    end = model.chat.end_of_turn_id
    rows = [[5, 6, 7], [end, 8, 9], [11, end, 10], [12, 13, end], [14, 15, 16]]
    samples = iter(torch.tensor(rows))
    module = importlib.import_module("nanovlm.generate")
    monkeypatch.setattr(module, "sample", lambda *_: next(samples))
    batch, streamed = prompt_batch(model, PROMPTS[:3]), []
    answers = generate(model, batch, max_new_tokens=20, on_tokens=streamed.append)
    assert answers == [[5], [6, 8], [7, 9, 10]]
    assert streamed == [[5, 6, 7], [-1, 8, 9], [-1, -1, 10], [-1, -1, -1]]
    assert len(list(samples)) == 1  # nothing is sampled after the last row has ended


def test_generate_stops_at_each_end_token_of_the_folder(model, monkeypatch):
    config = dataclasses.replace(model.chat.config, end_ids=(20, 21))
    monkeypatch.setattr(model, "chat", Chat(config, model.tokenizer))
    samples = iter(torch.tensor([[5, 20, model.chat.end_of_turn_id], [21, 6, 7], [8, 9, 10]]))
    module = importlib.import_module("nanovlm.generate")
    monkeypatch.setattr(module, "sample", lambda *_: next(samples))
    assert generate(model, prompt_batch(model, PROMPTS[:3]), max_new_tokens=20) == [[5], [], []]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_answers_equal_transformers(tmp_path, family, penalty):
    reference = qwen(tmp_path, family, head_dim=16, vocab_size=211)
    ours = load_language_model(tmp_path)
    ids = torch.randint(211, (3, 9), generator=torch.Generator().manual_seed(0))
    expected = reference.generate(
        ids,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        repetition_penalty=penalty,
        pad_token_id=0,
        eos_token_id=None,
    )
    prompt, sampling = Prompt(ours.embed_tokens(ids), ids), Sampling(repetition_penalty=penalty)
    steps = decode(ours, prompt, NEW_TOKENS, (), sampling)
    assert torch.tensor(list(steps)).T.tolist() == expected[:, 9:].tolist()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5),
        Sampling(temperature=2.0, top_k=3),
        Sampling(1.0, top_p=0.6),
        Sampling(1.0, top_p=0.01),
        Sampling(1.5, top_p=0.8, top_k=5),
        Sampling(1.0, repetition_penalty=1.7),
        Sampling(0.7, top_p=0.9, top_k=6, repetition_penalty=0.6),
        Sampling(1.0, top_k=99),
    ],
    ids=str,
)
def test_samples_follow_the_distribution_of_the_reference(sampling):
    vocabulary, draws = 12, 20_000
    logits = 2 * torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(5))
    previous = torch.tensor([[int(logits.argmax()), int(logits.argmin()), 3, 3]])
    warpers = [RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
    warpers += [TemperatureLogitsWarper(sampling.temperature)]
    warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [TopPLogitsWarper(sampling.top_p)]
    expected = LogitsProcessorList(warpers)(previous, logits.clone()).softmax(dim=-1)[0]
    generator = torch.Generator().manual_seed(0)
    tokens = sample(logits.expand(draws, -1), previous.expand(draws, -1), sampling, generator)
    counts = tokens.bincount(minlength=vocabulary)
    assert not counts[expected == 0].any()
    assert counts[expected > 1e-3].all()
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((counts / draws - expected).abs() <= 4 * deviation + 1e-9).all()


def test_sampling_does_not_change_the_logits():
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    previous = torch.zeros(2, 3, dtype=torch.long)
    sample(logits, previous, Sampling(1.0, 0.5, 3, 1.5), torch.Generator())
    assert torch.equal(logits, before)


def test_the_same_seed_gives_the_same_answer(model):
    batch = prompt_batch(model, PROMPTS)
    first, again, other = (
        decode_batch(model, batch, Sampling(temperature=1.0, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again != other
    greedy, other_seed = (decode_batch(model, batch, Sampling(seed=seed)) for seed in (1, 2))
    assert greedy == other_seed


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"temperature": -0.1}, "temperature is -0.1; it has to be 0 or more"),
        ({"temperature": 1e-45}, "temperature is 1e-45"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0; it has to be above 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"top_k": -1}, "top_k is -1; it has to be 0 or more"),
        ({"top_k": 2**31}, "top_k is 2147483648"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it has to be above 0"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty is 1e-300"),
        ({"repetition_penalty": math.inf}, "repetition_penalty is inf"),
    ],
)
def test_invalid_sampling_settings_are_refused(setting, message):
    with pytest.raises(NanoVLMError, match=message):
        Sampling(**setting)


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
@pytest.mark.parametrize("penalty", [1e-3, 1e3])
def test_the_extremes_of_sampling_leave_finite_logits(temperature, penalty):
    """Logits of thousands, as a large model has: whatever is drawn is a token of the vocabulary."""
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 1e4
    seen = torch.arange(20).expand(4, 20)
    sampling = Sampling(temperature, top_k=2**31 - 1, repetition_penalty=penalty)
    tokens = sample(logits, seen, sampling, torch.Generator().manual_seed(1))
    if temperature < 1:  # as good as greedy
        assert tokens.tolist() == sample(logits, seen, Sampling(0, 1, 0, penalty), None).tolist()
    assert tokens.min() >= 0 and tokens.max() < 50


def test_a_prompt_that_is_too_long_is_refused(model):
    batch = prompt_batch(model, ["a" * 20])
    length = batch.input_ids.shape[1]
    assert length < 256
    message = f"prompt of {length} tokens and 230 new ones exceed .* 256 positions"
    with pytest.raises(NanoVLMError, match=message):
        generate(model, batch, max_new_tokens=230)


@pytest.mark.parametrize("text", ["一只🐕在跑。", "👨‍👩‍👧 família", "plain", "混合 mixed 🏳️‍🌈", ""])
def test_text_is_streamed_in_whole_characters(tokenizer, text):
    streamer, pieces = TextStreamer(tokenizer), []
    ids = tokenizer.encode(text)
    for token in ids:
        pieces.append(streamer.put(token))
        assert "\ufffd" not in pieces[-1]
        assert text.startswith("".join(pieces))
    assert "".join(pieces) + streamer.end() == text
    # 🐕 takes several tokens, and all but the last give an empty piece.
    assert not text.startswith("一只🐕") or "" in pieces


def test_streaming_leaves_out_the_space_that_a_sentencepiece_tokenizer_prepends(tmp_path):
    sentence_piece(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for text in ("A little girl", " 红色", "\n图中 x"):
        streamer, ids = TextStreamer(tokenizer), tokenizer.encode(text)
        assert "".join(map(streamer.put, ids)) + streamer.end() == text == tokenizer.decode(ids)


def test_an_answer_that_stops_inside_a_character_ends_in_one_replacement_character(tokenizer):
    streamer = TextStreamer(tokenizer)
    ids = tokenizer.encode("a🐕")
    assert "".join(map(streamer.put, ids[:-1])) == "a" and streamer.end() == "\ufffd"


REAL_PROMPTS = [
    "你好，请介绍一下你自己。",
    "中国的首都是哪里？",
    "用一句话描述春天。",
    "写一首关于月亮的短诗。",
    "为什么天空是蓝色的？",
    "1+1等于几？",
    "请列出三种水果。",
    "什么是机器学习？",
    "把“我喜欢读书”翻译成英文。",
    "如何煮一碗面条？",
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain gravity to a child.",
    "List three primary colours.",
    "What is 12 times 12?",
    "Translate 'good morning' into Chinese.",
    "Why do leaves fall in autumn?",
    "Write a Python function that adds two numbers.",
    "Who wrote Hamlet?",
    "Describe a cat in one sentence.",
]


@pytest.mark.slow
def test_greedy_answers_equal_transformers_on_real_weights():
    if "NANOVLM_REAL" not in os.environ:
        pytest.skip("NANOVLM_REAL does not name a folder with qwen2.5-0.5b")
    folder = Path(os.environ["NANOVLM_REAL"]) / "qwen2.5-0.5b"
    ours = load_language_model(folder, dtype=torch.float32)
    reference = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer, reference_tokenizer = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    end = tokenizer.special_tokens["<|im_end|>"]
    for prompt in REAL_PROMPTS:
        ids = reference_tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=False,
        )
        expected = reference.generate(
            ids,
            max_new_tokens=40,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            eos_token_id=end,
            pad_token_id=end,
        )[0, ids.shape[1] :]
        steps = [row[0] for row in decode(ours, Prompt(ours.embed_tokens(ids), ids), 40, {end})]
        answer = tokenizer.decode([token for token in steps if token >= 0])
        assert answer == reference_tokenizer.decode(expected, skip_special_tokens=True), prompt
