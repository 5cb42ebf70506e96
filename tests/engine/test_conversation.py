"""Turns of a conversation are answered as if all of it were read again, and only what is new is
read."""

import dataclasses

import pytest
from torch import Tensor

import nanovlm.engine.conversation
from nanovlm.engine.conversation import Conversation
from nanovlm.errors import NanoVLMError
from nanovlm.generate import generate
from nanovlm.inputs.batch import Batch
from nanovlm.inputs.chat import Message
from nanovlm.model.language_model import LanguageModel
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.sampling import Sampling
from tests.reference.models import tiny_vlm
from tests.test_generate import prompt_batch_of

QUESTIONS = ["<image>描述图片", "And now?", "比较 <image> 和 <image>", "好", "What is it?"]
NEW_TOKENS = 12
TRAINED_LENGTH = 110


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> VisionLanguageModel:
    return tiny_vlm(tmp_path_factory.mktemp("vlm"), head_dim=12, tie_word_embeddings=False, seed=2)


class Talk:
    """The turns so far, as a caller of `Conversation` keeps them."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self.model, self.messages = model, []

    def ask(self, question: str) -> Batch:
        self.messages.append(Message.parse("user", question))
        return prompt_batch_of(self.model, self.messages)

    def answer(self, tokens: list[int]) -> None:
        text = self.model.tokenizer.decode(tokens)
        self.messages.append(Message("assistant", (text,)))


@pytest.fixture
def read(model, monkeypatch) -> list[int]:
    """How many tokens each pass through the language model reads."""
    lengths: list[int] = []
    hidden_states = LanguageModel.hidden_states

    def recorded(self, embeddings: Tensor, *rest, **options) -> Tensor:
        lengths.append(embeddings.shape[1])
        return hidden_states(self, embeddings, *rest, **options)

    monkeypatch.setattr(LanguageModel, "hidden_states", recorded)
    return lengths


@pytest.fixture
def encoded(model, monkeypatch) -> list[int]:
    """How many tiles each pass through the vision encoder encodes."""
    counts: list[int] = []
    patches = model.vision_encoder.patches

    def recorded(pixels: Tensor, *rest) -> Tensor:
        counts.append(len(pixels))
        return patches(pixels, *rest)

    monkeypatch.setattr(model.vision_encoder, "patches", recorded)
    return counts


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, 0.9, 0, 1.3, seed=3)])
def test_every_turn_is_answered_as_if_everything_were_read_again(model, monkeypatch, sampling):
    monkeypatch.setattr(nanovlm.engine.conversation, "SPARE", 0)  # the cache has to grow
    conversation, talk = Conversation(model), Talk(model)
    for question in QUESTIONS:
        batch = talk.ask(question)
        answer = conversation.generate(batch, NEW_TOKENS, sampling)
        assert answer == generate(model, batch, NEW_TOKENS, sampling)[0] and len(set(answer)) > 2
        talk.answer(answer)


def test_only_what_is_new_is_read_and_each_image_is_encoded_once(model, read, encoded):
    conversation, talk = Conversation(model), Talk(model)
    for question in QUESTIONS:
        batch = talk.ask(question)
        held = list(conversation.input_ids)
        read.clear()
        talk.answer(conversation.generate(batch, NEW_TOKENS))
        ids = batch.input_ids[0].tolist()
        same = next(
            (place for place, (one, other) in enumerate(zip(held, ids)) if one != other), len(held)
        )
        assert read[0] == len(ids) - same
        # The answer is decoded and encoded again: its tokens may differ, what is before may not.
        assert read[0] < 60 + NEW_TOKENS and set(read[1:]) <= {1}
    assert encoded == [1, 2]


def test_another_image_is_read_from_its_place_on(model, read, encoded):
    conversation, talk = Conversation(model), Talk(model)
    talk.answer(conversation.generate(talk.ask("Hi <image> and <image>"), 4))
    batch = talk.ask("And?")
    batch.pixels[1] += 1
    read.clear()
    answer = conversation.generate(batch, NEW_TOKENS)
    assert read[0] == batch.input_ids.shape[1] - int(batch.image_positions[model.image_length])
    assert encoded == [2, 1]
    assert answer == generate(model, batch, NEW_TOKENS)[0]


def test_an_answer_that_is_taken_back_or_broken_off_changes_nothing(model):
    conversation, talk = Conversation(model), Talk(model)
    first = talk.ask("<image>描述图片")

    class StoppedError(Exception):
        pass

    def stop(tokens: list[int]) -> None:
        seen.append(tokens[0])
        if len(seen) == 3:
            raise StoppedError

    seen: list[int] = []
    with pytest.raises(StoppedError):
        conversation.generate(first, NEW_TOKENS, on_tokens=stop)
    expected = generate(model, first, NEW_TOKENS)[0]
    assert seen == expected[:3]
    for _ in range(2):  # asked again, the same question has the same answer
        assert conversation.generate(first, NEW_TOKENS) == expected
    other = Talk(model).ask("Something else")
    assert conversation.generate(other, NEW_TOKENS) == generate(model, other, NEW_TOKENS)[0]


def test_a_conversation_that_gets_too_long_is_refused_and_goes_on_when_shortened(model):
    conversation = Conversation(model)
    batch = Talk(model).ask("Hi")
    room = model.config.language_model.max_position_embeddings
    with pytest.raises(NanoVLMError, match="exceed the language model's"):
        conversation.generate(batch, room)
    assert conversation.generate(batch, 4) == generate(model, batch, 4)[0]


def test_bidirectional_images(model, monkeypatch):
    monkeypatch.setattr(
        model, "config", dataclasses.replace(model.config, bidirectional_images=True)
    )
    conversation, talk = Conversation(model), Talk(model)
    for question in QUESTIONS:
        batch = talk.ask(question)
        answer = conversation.generate(batch, NEW_TOKENS)
        assert answer == generate(model, batch, NEW_TOKENS)[0]
        talk.answer(answer)


def test_the_first_qwen_reads_a_long_conversation_again(model, read, monkeypatch):
    """Beyond its trained length its rotary base depends on the length of the prompt."""
    language = dataclasses.replace(
        model.language_model.config,
        rope_type="dynamic_ntk",
        original_max_position_embeddings=TRAINED_LENGTH,
    )
    monkeypatch.setattr(model.language_model, "config", language)
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, language_model=language))
    conversation, talk = Conversation(model), Talk(model)
    lengths, whole = [], []
    for question in QUESTIONS:
        batch = talk.ask(question)
        read.clear()
        answer = conversation.generate(batch, NEW_TOKENS)
        lengths.append(batch.input_ids.shape[1])
        whole.append(read[0] == lengths[-1])
        assert answer == generate(model, batch, NEW_TOKENS)[0]
        talk.answer(answer)
    assert lengths[1] <= TRAINED_LENGTH < lengths[2]
    assert whole == [True, False, True, True, True]
