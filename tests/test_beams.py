"""Beam search: the answers and scores of `transformers`, and the same with and without a cache,
alone and in a batch, in compute dtypes and with quantized weights."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from nanovlm.beams import Beams
from nanovlm.engine.answering import Request, answer_together, encode_request
from nanovlm.engine.conversation import Conversation
from nanovlm.engine.weight_only import quantize_for_answers
from nanovlm.errors import NanoVLMError
from nanovlm.generate import CompiledSteps, Prompt, decode, generate, search
from nanovlm.hub.models import load_language_model
from nanovlm.inputs.chat import Message
from nanovlm.model.language_model import LanguageModel
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.sampling import Sampling
from tests.reference.models import qwen, tiny_vlm
from tests.test_compiled_decoding import VARIANTS, build, make_prompt
from tests.test_generate import PROMPTS, prompt_batch, prompt_batch_of

VOCABULARY, PENALTIES = 211, (0.0, 1.0, 2.0, -1.0)
Found = list[list[tuple[list[int], float]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("qwen2")


@pytest.fixture(scope="module")
def reference(folder: Path) -> PreTrainedModel:
    return qwen(folder, head_dim=16, vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def language_model(folder: Path, reference: PreTrainedModel) -> LanguageModel:
    return load_language_model(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> VisionLanguageModel:
    return tiny_vlm(tmp_path_factory.mktemp("vlm"), tie_word_embeddings=False, seed=2)


def padded_rows() -> tuple[Tensor, Tensor]:
    """Ids (4, 9) without the id 0, which is padding, and their mask: two rows are shorter."""
    ids = torch.randint(1, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[3, :1] = 0
    return ids, mask


def found_by(
    model: LanguageModel,
    rows: tuple[Tensor, Tensor],
    sampling: Sampling,
    new_tokens: int,
    stops: list[int],
    use_cache: bool = True,
) -> Found:
    """What `search` finds after (ids, mask)."""
    ids, mask = rows
    with torch.inference_mode():
        prompt = Prompt(model.embed_tokens(ids), ids, mask)
    return search(model, prompt, new_tokens, stops, sampling, use_cache)


def found_by_transformers(
    reference: PreTrainedModel,
    rows: tuple[Tensor, Tensor],
    sampling: Sampling,
    new_tokens: int,
    stops: list[int],
) -> Found:
    output = reference.generate(
        rows[0],
        attention_mask=rows[1],
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=sampling.beams,
        num_return_sequences=sampling.beams,
        length_penalty=sampling.length_penalty,
        repetition_penalty=sampling.repetition_penalty,
        early_stopping=False,
        pad_token_id=0,
        eos_token_id=stops or None,
        return_dict_in_generate=True,
        output_scores=True,
    )
    new = output.sequences[:, rows[0].shape[1] :].tolist()
    ids = [[token for token in row if token not in (0, *stops)] for row in new]
    pairs = list(zip(ids, output.sequences_scores.tolist()))
    return [pairs[start : start + sampling.beams] for start in range(0, len(ids), sampling.beams)]


def require_equal(ours: Found, theirs: Found, tolerance: float = 1e-4) -> None:
    """The same ids, and scores that are close (they are relative to the largest)."""
    assert [[ids for ids, _ in row] for row in ours] == [[ids for ids, _ in row] for row in theirs]
    scores = [[score for row in found for _, score in row] for found in (ours, theirs)]
    assert scores[0] == pytest.approx(scores[1], rel=tolerance)


@pytest.mark.parametrize("stops", [[], [7], [3, 50, 120], [*range(100, 130)]], ids=len)
@pytest.mark.parametrize("beams", [2, 5])
def test_answers_and_scores_equal_transformers(reference, language_model, beams, stops):
    lengths, best = set(), set()
    for penalty in PENALTIES:
        for new_tokens in (1, 20):
            sampling = Sampling(beams=beams, length_penalty=penalty)
            flags = padded_rows(), sampling, new_tokens, stops
            ours = found_by(language_model, *flags)
            require_equal(ours, found_by_transformers(reference, *flags))
            lengths |= {len(ids) for row in ours for ids, _ in row}
            best.add(str([row[0][0] for row in ours]))
    if len(stops) == 30:  # enough for answers that end early, which the penalty is about
        assert len(lengths) >= 5 and len(best) >= 4


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_the_repetition_penalty_is_that_of_transformers(reference, language_model, penalty):
    ids, _ = padded_rows()
    rows = ids, torch.ones_like(ids)  # theirs counts what is at padding
    flags = rows, Sampling(repetition_penalty=penalty, beams=3), 20, [*range(100, 130)]
    require_equal(found_by(language_model, *flags), found_by_transformers(reference, *flags))


@pytest.mark.parametrize("family", ["qwen3", "llama", "mistral"])
def test_answers_of_other_families_equal_transformers(tmp_path, family):
    window = {"sliding_window": None} if family == "mistral" else {}
    reference = qwen(tmp_path, family, head_dim=16, vocab_size=VOCABULARY, **window)
    flags = padded_rows(), Sampling(beams=4), 20, [*range(100, 115)]
    ours = found_by(load_language_model(tmp_path), *flags)
    require_equal(ours, found_by_transformers(reference, *flags))


def test_a_whole_search_finds_the_likeliest_answer(language_model):
    """With a beam for every beginning, nothing likelier is left out; greedy decoding does so."""
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        next_probs = language_model(ids)[0, -1].log_softmax(-1)
        texts = torch.cat((ids.expand(VOCABULARY, -1), torch.arange(VOCABULARY)[:, None]), dim=1)
        totals = next_probs[:, None] + language_model(texts)[:, -1].log_softmax(-1)
        prompt = Prompt(language_model.embed_tokens(ids), ids)
    best = divmod(int(totals.argmax()), VOCABULARY)
    sampling = Sampling(beams=VOCABULARY, length_penalty=0.0)
    (tokens, score), *_ = search(language_model, prompt, 2, [], sampling)[0]
    assert tokens == list(best) and score == pytest.approx(float(totals.max()), rel=1e-4)


@pytest.mark.parametrize("pad_left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_rows_of_a_batch_are_answered_as_alone(model, pad_left, use_cache):
    sampling, stops = Sampling(beams=3), [*range(20, 30)]

    def found(prompts: list[str]) -> Found:
        prompt = Prompt.of(model, prompt_batch(model, prompts, pad_left))
        return search(model.language_model, prompt, 15, stops, sampling, use_cache)

    alone = [found([prompt])[0] for prompt in PROMPTS]
    require_equal(found(PROMPTS), alone)
    assert len({str(row[0][0]) for row in alone}) > 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_every_kind_of_language_model_are_answered_as_alone_and_read_again(variant):
    model, flags = build(**VARIANTS[variant]), (10, [96], Sampling(beams=3))
    with torch.no_grad():
        prompt = make_prompt(model, [9, 4, 12], grouped=True)
    tensors = prompt.embeddings, prompt.input_ids, prompt.attention_mask, prompt.groups
    rows = [Prompt(*row) for row in zip(*(tensor.split(1) for tensor in tensors))]
    alone = [search(model, row, *flags, use_cache=False)[0] for row in rows]
    require_equal(search(model, prompt, *flags), alone)


def test_generate_decode_and_conversations_give_the_best_answer(model):
    sampling, batch = Sampling(beams=3), prompt_batch(model, PROMPTS)
    stops = model.chat.stop_ids
    found = search(model.language_model, Prompt.of(model, batch), 12, stops, sampling)
    best, streamed = [row[0][0] for row in found], []
    assert generate(model, batch, 12, sampling, streamed.append) == best
    assert best != generate(model, batch, 12)
    assert [[token for token in row if token >= 0] for row in zip(*streamed)] == best
    conversation, messages = Conversation(model), [Message.parse("user", PROMPTS[0])]
    for text in ("a", "Hi"):
        whole = prompt_batch_of(model, messages)
        assert conversation.generate(whole, 12, sampling) == generate(model, whole, 12, sampling)[0]
        messages += [Message("assistant", (text,)), Message.parse("user", text)]


def test_an_answer_in_steps_ends_where_the_caller_says(model):
    batch = prompt_batch(model, PROMPTS[:2])
    steps = decode(model.language_model, Prompt.of(model, batch), 6, (), Sampling(beams=2))
    first, second = [*next(steps)], [*steps.send([0])]
    assert min(first) >= 0 and second[0] == -1 and second[1] >= 0
    assert len(list(steps)) == 4


def test_requests_are_answered_together_by_beam_search(model):
    sampling = Sampling(beams=3)
    requests = [Request([Message("user", (text,))], (), 9, sampling) for text in ("Hi", "a b c d")]
    encoded = [encode_request(model, request) for request in requests]
    together = [answer.text for answer in answer_together(model, encoded)]
    assert together == [answer_together(model, [each])[0].text for each in encoded]
    encoded[1].request.sampling = Sampling(beams=2)
    with pytest.raises(NanoVLMError, match="all rows have to have the same sampling"):
        answer_together(model, encoded)


@pytest.mark.parametrize("bits", ["bfloat16", "int8", "int4"])
def test_cached_and_uncached_answers_agree_in_few_bits(tmp_path, bits):
    """Up to rounding, in which two answers may come as close as to change places."""
    qwen(tmp_path, hidden_size=64, intermediate_size=64, head_dim=16, vocab_size=VOCABULARY)
    model = load_language_model(tmp_path)
    if bits == "bfloat16":
        model = model.to(torch.bfloat16)
    else:
        quantize_for_answers(model, bits, torch.float32)
    flags = padded_rows(), Sampling(beams=3), 8, [*range(100, 130)]
    cached, uncached = found_by(model, *flags), found_by(model, *flags, use_cache=False)
    if bits != "bfloat16":
        require_equal(cached, uncached)
    scores = [[row[0][1] for row in found] for found in (cached, uncached)]
    assert scores[0] == pytest.approx(scores[1], rel=0.02) and max(scores[0]) < 0


def test_only_what_is_written_is_copied_to_reorder_the_cache(language_model):
    cache = language_model.new_cache(2, 6)
    with torch.inference_mode():
        language_model(torch.tensor([[1, 2, 3], [4, 5, 6]]), cache=cache)
        copies = cache.longer(8, copies=2)
        addresses = copies.keys.data_ptr(), copies.values.data_ptr()
        language_model(torch.tensor([[7], [8], [9], [10]]), cache=copies)
        before = copies.keys.clone(), copies.values.clone()
        copies.reorder(torch.tensor([1, 1, 3, 2]), start=3)
    assert (copies.keys.data_ptr(), copies.values.data_ptr()) == addresses
    for ours, theirs, old in zip((copies.keys, copies.values), (cache.keys, cache.values), before):
        assert torch.equal(ours[:, :, :, :3], theirs[:, [0, 0, 1, 1], :, :3])
        assert torch.equal(ours[:, :, :, 3], old[:, [1, 1, 3, 2], :, 3])


def test_an_answer_that_no_beginning_can_beat_ends_its_row():
    """By hand: two tokens and an end token, 2. Scores are log probabilities over the length."""
    beams = Beams(1, 2, torch.tensor([2]), length_penalty=1.0)

    def advance(*rows: list[float]) -> list[int]:
        return beams.advance(torch.tensor(rows).log()).tolist()

    assert advance([0.5, 0.3, 0.2], [0.5, 0.3, 0.2]) == [0, 0]
    assert beams.ids.tolist() == [[[0], [1]]] and beams.going_on.all()
    # 0·end 0.30 and 1·end 0.27 end; what goes on is 0·0 with 0.15 and 0·1 with 0.05.
    assert advance([0.3, 0.1, 0.6], [0.05, 0.05, 0.9]) == [0, 0]
    assert not beams.going_on.any()
    advance([0.0, 0.0, 1.0], [0.0, 0.0, 1.0])  # 0·0·end would score more than 1·end
    (first, best), (second, other) = beams.answers()[0]
    assert (first, second) == ([0], [1])
    assert best == pytest.approx(math.log(0.3) / 2) and other == pytest.approx(math.log(0.27) / 2)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"beams": 0}, "beams is 0; it has to be above 0"),
        ({"beams": 257}, "beams is 257; it has to be at most 256"),
        ({"beams": 2, "length_penalty": 4.5}, "length_penalty is 4.5; it has to be at most 4"),
        ({"beams": 2, "length_penalty": -5.0}, "length_penalty is -5.0; it has to be -4 or more"),
        ({"beams": 2, "length_penalty": math.nan}, "length_penalty is nan"),
        ({"length_penalty": 0.0}, "length_penalty belongs to beam search"),
        ({"beams": 2, "temperature": 0.5}, "draws nothing; leave out beams"),
        ({"beams": 2, "top_k": 5}, "draws nothing; leave out beams"),
        ({"beams": 2, "top_p": 0.5}, "draws nothing; leave out beams"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(NanoVLMError, match=message):
        Sampling(**settings)


def test_compiled_steps_and_long_prompts_are_refused(model, monkeypatch):
    batch, sampling = prompt_batch(model, ["a" * 20]), Sampling(beams=2)
    with pytest.raises(NanoVLMError, match=r"and 250 new ones exceed .* 256 positions"):
        generate(model, batch, 250, sampling)
    compiled = CompiledSteps(model.language_model)
    monkeypatch.setattr(model.language_model, "compiled_steps", compiled, raising=False)
    message = "beam search has no compiled steps; leave out --compile or --beams"
    with pytest.raises(NanoVLMError, match=message):
        generate(model, batch, 5, sampling)
