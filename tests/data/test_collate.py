"""`prepare` gives what training gives for the same records, and refuses what does not fit
together."""

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image

from nanovlm import prepare
from nanovlm.data.batches import Batches, BatchOptions, RecordEncoder
from nanovlm.data.records import Record
from nanovlm.errors import NanoVLMError
from nanovlm.generate import generate
from nanovlm.inputs.batch import Batch
from nanovlm.inputs.chat import IMAGE, Message
from nanovlm.inputs.image import open_image
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.model.vlm import VisionLanguageModel
from tests.inputs.test_image import random_image
from tests.reference.models import tiny_vlm

SIZES = ((60, 60), (90, 20), (10, 70))
KINDS = {
    "whole images": ImageConfig(28, 28),
    "tiles": ImageConfig(28, 28, fit="tiles", max_tiles=3),
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS.keys())
def model(request: pytest.FixtureRequest, tmp_path_factory) -> VisionLanguageModel:
    folder = tmp_path_factory.mktemp("vlm")
    return tiny_vlm(folder, image=request.param, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[Record]:
    """Records of one image, two, and none; of one turn and two; all of unequal lengths."""
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{number}.png" for number in range(len(SIZES))]
    for seed, (path, size) in enumerate(zip(paths, SIZES)):
        random_image(*size, seed).save(path)
    turns = (
        (paths[:1], ("<image>\n描述图片", "一个圆形。")),
        (paths[1:], ("<image> or <image>?", "a", "and above?", "the second one")),
        ([], ("你好", "hi")),
    )
    roles = ("user", "assistant") * 2
    return [
        Record(f"data.jsonl:{n}", tuple(images), tuple(map(Message.parse, roles, texts)), (), {})
        for n, (images, texts) in enumerate(turns)
    ]


def opened(record: Record) -> list[Image.Image]:
    return [open_image(path) for path in record.images]


def trained(model: VisionLanguageModel, records: list[Record]) -> Batch:
    options = BatchOptions(batch_size=len(records), max_length=1000, shuffle=False)
    return Batches(records, RecordEncoder.of(model), options)[0].batch


def assert_same(batch: Batch, expected: Batch) -> None:
    for name in (field.name for field in dataclasses.fields(Batch)):
        one, other = getattr(batch, name), getattr(expected, name)
        same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        assert same, name


def test_records_give_the_batch_that_training_gives(model, records):
    batch = prepare(model, [record.messages for record in records], list(map(opened, records)))
    assert_same(batch, trained(model, records))
    assert len(batch.pixels) == (3 if model.config.image.fit == "squash" else 10 + 4 + 4)


def test_one_record_has_the_same_batch_without_a_mask(model, records):
    for record in records:
        expected = trained(model, [record])
        assert bool((expected.attention_mask == 1).all())
        batch = prepare(model, [record.messages], [opened(record)])
        assert_same(batch, dataclasses.replace(expected, attention_mask=None))


def test_prompts_end_together_with_the_opening_of_an_answer(model, records):
    questions = [record.messages[:-1] for record in records]
    images = list(map(opened, records))
    batch = prepare(model, questions, images, add_generation_prompt=True)
    earlier = model.tokenizer.encode("a")  # the answer of the one record with two turns
    assert batch.targets.tolist() == [*earlier, model.chat.end_of_turn_id]
    alone = [
        prepare(model, [question], [shown], add_generation_prompt=True)
        for question, shown in zip(questions, images)
    ]
    length = max(one.input_ids.shape[1] for one in alone)
    for row, mask, one, record in zip(batch.input_ids, batch.attention_mask, alone, records):
        ids = one.input_ids[0].tolist()
        padding = length - len(ids)
        assert row.tolist() == [0] * padding + ids and one.attention_mask is None
        assert mask.tolist() == [0] * padding + [1] * len(ids)
        assert trained(model, [record]).input_ids[0, : len(ids)].tolist() == ids
    assert generate(model, batch, 4) == [generate(model, one, 4)[0] for one in alone]


def test_images_of_one_conversation_at_a_time_are_opened(model, records, monkeypatch):
    alive = []

    def lazily(paths: tuple[Path, ...]):
        for path in paths:
            alive.append(path)
            yield open_image(path)

    encode = model.chat.encode

    def spy(messages, tokens, **options):
        assert len(tokens) == len(alive)
        alive.clear()
        return encode(messages, tokens, **options)

    monkeypatch.setattr(model.chat, "encode", spy)
    conversations = [record.messages for record in records]
    batch = prepare(model, conversations, [lazily(record.images) for record in records])
    monkeypatch.undo()
    assert_same(batch, trained(model, records))


def test_what_does_not_fit_together_is_refused_with_both_numbers(model, records):
    messages, images = records[0].messages, opened(records[0])
    with pytest.raises(NanoVLMError, match="1 conversations and the images of 2"):
        prepare(model, [messages], [images, images])
    with pytest.raises(NanoVLMError, match="at least one conversation"):
        prepare(model, [], [])
    with pytest.raises(NanoVLMError, match="places for 1 images, and 2 are given"):
        prepare(model, [messages], [images * 2])
    with pytest.raises(NanoVLMError, match="places for 3 images, and 0 are given"):
        prepare(model, [[Message("user", (IMAGE, IMAGE, IMAGE, "?"))]], [[]])
