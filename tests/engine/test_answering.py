"""Requests answered together get the answers that they would get alone, and end where they are
asked to."""

import pytest
import torch
from PIL import Image

from nanovlm.data.collate import prepare
from nanovlm.engine.answering import (
    Answer,
    EncodedRequest,
    Request,
    answer_together,
    encode_request,
)
from nanovlm.errors import NanoVLMError
from nanovlm.generate import generate
from nanovlm.inputs.chat import Message
from nanovlm.model.language_model import LanguageModel
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.sampling import Sampling
from tests.reference.models import tiny_vlm

SAMPLINGS = [
    Sampling(),
    Sampling(1.0, seed=1),
    Sampling(0.8, 0.9, 5, 1.2, seed=2),
    Sampling(repetition_penalty=1.3),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> VisionLanguageModel:
    return tiny_vlm(tmp_path_factory.mktemp("vlm"), head_dim=12, tie_word_embeddings=False, seed=2)


def image(number: int) -> Image.Image:
    return Image.new("RGB", (40, 30), (40 * number % 256, 90, 255 - 30 * number))


def request(number: int, **changes) -> Request:
    """Requests differ in length, number of images, limit and sampling."""
    question = "<image>" * (number % 3) + "描述图片 " * (number % 4 + 1) + str(number)
    settings = dict(max_new_tokens=10 + number, sampling=SAMPLINGS[number % len(SAMPLINGS)])
    images = [image(number + place) for place in range(number % 3)]
    return Request([Message.parse("user", question)], images, **{**settings, **changes})


def answer(model: VisionLanguageModel, *requests: Request) -> list[Answer]:
    return answer_together(model, [encode_request(model, each) for each in requests])


def alone(model: VisionLanguageModel, each: Request) -> str:
    """By the plain way: one row, all text at the end."""
    batch = prepare(model, [each.messages], [each.images], add_generation_prompt=True)
    (tokens,) = generate(model, batch, each.max_new_tokens, each.sampling)
    return model.tokenizer.decode(tokens)


def test_every_request_gets_the_answer_that_it_would_get_alone(model):
    requests = [request(number) for number in range(9)]
    expected = [alone(model, each) for each in requests]
    assert len(set(expected)) == len(expected)
    answers = answer(model, *requests)
    assert [each.text for each in answers] == expected
    for each, given in zip(requests, answers):
        assert 0 < given.completion_tokens <= each.max_new_tokens
        ended = given.completion_tokens < each.max_new_tokens
        assert given.finish_reason == ("stop" if ended else "length")
        assert given.prompt_tokens == len(encode_request(model, each))
    assert "length" in {given.finish_reason for given in answers}


def test_the_end_of_turn_ends_an_answer(model, monkeypatch):
    plain = [request(number, sampling=Sampling()) for number in range(4)]
    batch = prepare(model, [plain[1].messages], [plain[1].images], add_generation_prompt=True)
    stop = generate(model, batch, 4)[0][3]
    monkeypatch.setattr(model.chat, "stop_ids", {stop})
    answers = answer(model, *plain)
    assert answers[1].finish_reason == "stop" and answers[1].completion_tokens == 3
    assert [each.text for each in answers] == [alone(model, each) for each in plain]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_an_answer_ends_before_a_stop_text_wherever_tokens_divide_it(model, length):
    whole = alone(model, request(1))
    for start in range(1, len(whole) - length):
        stop = whole[start : start + length]
        pieces: list[str] = []
        asked = request(1, stop=("not in it", stop), on_text=pieces.append)
        (given,) = answer(model, asked)
        assert given.text == "".join(pieces) == whole[: whole.index(stop)]
        assert given.finish_reason == "stop"


def test_a_stop_text_that_never_comes_loses_nothing(model):
    whole = alone(model, request(1))
    (given,) = answer(model, request(1, stop=(whole[-1] + "never",)))
    assert given.text == whole


def test_text_comes_as_it_is_written_and_a_listener_may_end_one_answer(model):
    heard: dict[int, list[str]] = {0: [], 1: [], 2: []}

    def listener(number: int, most: int):
        def on_text(text: str) -> bool:
            heard[number].append(text)
            return len(heard[number]) < most

        return on_text

    requests = [
        request(number, on_text=listener(number, 3 if number == 1 else 99)) for number in range(3)
    ]
    answers = answer(model, *requests)
    for number, given in enumerate(answers):
        assert "".join(heard[number]) == given.text
    assert answers[1].completion_tokens == 3 and answers[1].finish_reason == "stop"
    assert answers[0].text == alone(model, request(0)) and answers[2].text == alone(
        model, request(2)
    )


def test_all_are_read_in_one_pass_unless_they_do_not_fit_together(model, monkeypatch):
    rows: list[int] = []
    hidden_states = LanguageModel.hidden_states

    def recorded(self, embeddings, *rest, **options):
        if embeddings.shape[1] > 1:
            rows.append(len(embeddings))
        return hidden_states(self, embeddings, *rest, **options)

    monkeypatch.setattr(LanguageModel, "hidden_states", recorded)
    requests = [request(number) for number in range(4)]
    answer(model, *requests)
    assert rows == [4]
    rows.clear()
    limit = model.config.language_model.max_position_embeddings
    long_answer = request(0, max_new_tokens=limit - len(encode_request(model, request(0))))
    long_answer.on_text = lambda text: False
    answers = answer(model, *requests, long_answer)
    assert rows == [4, 1]
    assert [each.text for each in answers[:4]] == [alone(model, each) for each in requests]


def test_a_request_that_is_too_long_or_lacks_an_image_is_refused_by_itself(model):
    limit = model.config.language_model.max_position_embeddings
    with pytest.raises(NanoVLMError, match=f"and {limit} new ones exceed .* {limit} positions"):
        encode_request(model, request(0, max_new_tokens=limit))
    with pytest.raises(NanoVLMError):
        encode_request(model, Request([Message.parse("user", "<image> Hi")], []))


def test_what_was_encoded_is_not_changed(model):
    encoded: EncodedRequest = encode_request(model, request(2))
    first, second = (answer_together(model, [encoded])[0] for _ in range(2))
    assert first == second
    assert all(torch.is_tensor(tile) for tile in encoded.tiles)
