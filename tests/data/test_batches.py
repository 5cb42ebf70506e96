"""The order of a run: a function of the seed, every record once an epoch, the same for any number
of workers."""

import dataclasses
import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from nanovlm.data.batches import Batches, BatchOptions, LoadedBatch, RecordEncoder
from nanovlm.data.records import Record
from nanovlm.data.workers import Loading
from nanovlm.inputs.chat import Chat, ChatConfig, ImageTokens, Message
from nanovlm.inputs.image import open_image, preprocess
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.tokenizer import load_tokenizer
from tests.reference.models import byte_pair

IMAGE_LENGTH = 4
PIXELS = ImageConfig(28, 28)


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Chat:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_pair(folder)
    return Chat(ChatConfig(), load_tokenizer(folder))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{number}.png" for number in range(5)]
    for number, path in enumerate(paths):
        Image.new("RGB", (30, 20), (50 * number, 255 - 50 * number, 90)).save(path)
    return paths


def record(number: int, images: Sequence[Path] = (), answer: str = "") -> Record:
    """A record that its answer tells apart from all others."""
    text = "<image>" * len(images) + f"what is {number % 3}?"
    messages = (
        Message.parse("user", text),
        Message.parse("assistant", answer or f"number {number}"),
    )
    return Record(f"data.jsonl:{number}", tuple(images), messages, (), {})


def make(records: Sequence[Record], chat: Chat, features=None, **options) -> Batches:
    options = BatchOptions(**dict(batch_size=4, share=4, max_length=200) | options)
    return Batches(records, RecordEncoder(chat, PIXELS, IMAGE_LENGTH), options, features)


@pytest.fixture
def records(images) -> list[Record]:
    """23 records: four questions to each of five images, and three without one."""
    return [
        record(number, images[number % 5 : number % 5 + 1] if number < 20 else ())
        for number in range(23)
    ]


def answers(chat: Chat, loaded: LoadedBatch) -> list[str]:
    text = chat.tokenizer.decode(loaded.batch.targets.tolist())
    return text.removesuffix("<|im_end|>").split("<|im_end|>")


def assert_same(first: LoadedBatch, second: LoadedBatch) -> None:
    for field in dataclasses.fields(first.batch):
        one, other = getattr(first.batch, field.name), getattr(second.batch, field.name)
        same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        assert same, field.name
    assert dataclasses.replace(first, batch=None) == dataclasses.replace(second, batch=None)


@pytest.mark.parametrize("share", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [1, 4, 30])
def test_every_record_comes_exactly_once_an_epoch(chat, records, share, batch_size):
    batches = make(records, chat, share=share, batch_size=batch_size)
    total = 3 * len(records)
    seen = [
        answer
        for number in range(-(-total // batch_size))
        for answer in answers(chat, batches[number])
    ]
    expected = sorted(f"number {number}" for number in range(23))
    epochs = [seen[start : start + 23] for start in range(0, total, 23)]
    assert [sorted(epoch) for epoch in epochs] == [expected] * 3
    if batch_size == 1:  # within a batch, records are put in the rows' order
        assert len(set(map(tuple, epochs))) == 3


def test_a_batch_depends_on_the_seed_and_its_number_alone(chat, records):
    straight = [make(records, chat, seed=3)[number] for number in range(9)]
    jumping = make(records, chat, seed=3)
    for number in (8, 0, 5, 2, 7):
        assert_same(jumping[number], straight[number])
    other = make(records, chat, seed=4)
    assert [answers(chat, other[number]) for number in range(5)] != [
        answers(chat, loaded) for loaded in straight[:5]
    ]


@pytest.mark.filterwarnings(
    "ignore:This DataLoader will create 2 worker processes"
)  # on a machine with one core
def test_any_number_of_workers_prepares_the_same(chat, records):
    batches = make(records, chat)
    expected = [batches[number] for number in range(2, 7)]
    for workers in (0, 2):
        prepared = list(batches.loader(2, 7, Loading(workers)))
        assert len(prepared) == 5
        for ours, theirs in zip(prepared, expected):
            assert_same(ours, theirs)


def test_a_pickled_copy_makes_the_same(chat, records):
    """As a worker process gets it where processes are spawned and not forked."""
    batches = make(records, chat, bucket=2)
    copy = pickle.loads(pickle.dumps(batches))
    for number in range(4):
        assert_same(copy[number], batches[number])


def test_a_bucket_does_not_reach_beyond_the_data(chat, records):
    far, whole = (make(records, chat, bucket=bucket) for bucket in (10**9, 6))
    assert far.options.bucket == len(far) == 6
    for number in range(7):
        assert_same(far[number], whole[number])


def test_without_shuffling_the_order_is_the_files_and_each_record_comes_once(chat, records):
    batches = make(records, chat, shuffle=False, share=1)
    seen = [answer for number in range(6) for answer in answers(chat, batches[number])]
    assert seen == [f"number {number}" for number in range(23)]


def test_samples_of_one_image_come_together_and_share_a_row(chat, images):
    records = [record(number, images[number % 5 : number % 5 + 1]) for number in range(20)]
    for number in range(5):
        loaded = make(records, chat)[number]
        assert loaded.samples == 4 and len(loaded.batch.pixels) == len(loaded.batch.input_ids) == 1
        asked = {int(answer.removeprefix("number ")) % 5 for answer in answers(chat, loaded)}
        assert len(asked) == 1
        assert torch.equal(
            loaded.batch.pixels[0], preprocess(open_image(images[asked.pop()]), PIXELS)
        )
    apart = make(records, chat, share=1)[0]
    assert len(apart.batch.pixels) == len(apart.batch.input_ids) == 4
    two_by_two = make(records, chat, share=2)[0]
    assert len(two_by_two.batch.pixels) == 2 and two_by_two.samples == 4


def test_tokens_are_counted_without_padding(chat, records):
    loaded = make(records, chat, share=1)[0]
    assert (
        loaded.tokens
        == int((loaded.batch.attention_mask > 0).sum())
        < loaded.batch.input_ids.numel()
    )


def test_pixels_are_those_of_the_rows_images_in_order(chat, images):
    records = [record(0, images[:2]), record(1, ()), record(2, images[2:3])]
    batch = make(records, chat, shuffle=False, batch_size=3)[0].batch
    expected = torch.stack([preprocess(open_image(path), PIXELS) for path in images[:3]])
    assert torch.equal(batch.pixels, expected)
    assert len(batch.image_positions) == 3 * IMAGE_LENGTH


def test_kept_features_take_the_place_of_pixels(chat, images):
    features = {
        path: torch.full((1, 16, 24), float(number)) for number, path in enumerate(images[:2])
    }
    records = [record(number, images[number : number + 1]) for number in range(3)]
    loaded = make(records, chat, shuffle=False, batch_size=3, features=features)[0]
    assert loaded.batch.pixels is None and loaded.samples == 2
    assert loaded.batch.patches[:, 0, 0].tolist() == [0, 1]
    assert loaded.skipped == [f"data.jsonl:2: image {images[2]} could not be read"]


def test_an_unreadable_image_is_skipped_and_named(chat, images, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(images[0].read_bytes()[:60])
    records = [
        record(0, images[:1]),
        record(1, [broken]),
        record(2, [images[1], broken]),
        record(3, images[1:2]),
    ]
    loaded = make(records, chat, shuffle=False)[0]
    assert (
        answers(chat, loaded) == ["number 0", "number 3"]
        and loaded.samples == 2
        and len(loaded.batch.pixels) == 2
    )
    assert [reason.split(": ")[:2] for reason in loaded.skipped] == [
        [f"data.jsonl:{n}", str(broken)] for n in (1, 2)
    ]
    nothing = make(records[1:3], chat, shuffle=False, batch_size=2)[0]
    assert (
        nothing.batch is None
        and nothing.samples == nothing.tokens == 0
        and len(nothing.skipped) == 2
    )


def test_text_is_cut_at_the_end_and_said_to_be(chat, images):
    whole = chat.encode(record(0, images[:1], "word " * 30).messages, [ImageTokens(IMAGE_LENGTH)])
    loaded = make([record(0, images[:1], "word " * 30)], chat, batch_size=1, max_length=40)[0]
    assert loaded.batch.input_ids.tolist() == [whole.input_ids[:40]] and loaded.cut == [
        "data.jsonl:0"
    ]
    assert loaded.batch.targets.tolist() == [label for label in whole.labels[:40] if label >= 0]
    exactly = make(
        [record(0, images[:1], "word " * 30)], chat, batch_size=1, max_length=len(whole.input_ids)
    )[0]
    assert exactly.cut == [] and exactly.batch.input_ids.tolist() == [whole.input_ids]


def test_an_image_is_never_cut(chat, images):
    last = Record(
        "data.jsonl:7",
        tuple(images[:1]),
        (
            Message.parse("user", "a"),
            Message.parse("assistant", "b"),
            Message.parse("user", "c <image>"),
            Message.parse("assistant", "d"),
        ),
        (),
        {},
    )
    encoded = chat.encode(last.messages, [ImageTokens(IMAGE_LENGTH)])
    # The position right after the image.
    end = len(encoded.input_ids) - encoded.input_ids[::-1].index(chat.image_token_id)
    for max_length in range(end - IMAGE_LENGTH, end):
        loaded = make([last], chat, batch_size=1, max_length=max_length)[0]
        assert loaded.batch is None
        (reason,) = loaded.skipped
        assert reason == (
            f"data.jsonl:7: an image lies beyond {max_length} tokens and an image is never cut; "
            "raise --max-length"
        )
    assert (
        len(make([last], chat, batch_size=1, max_length=end)[0].batch.image_positions)
        == IMAGE_LENGTH
    )


def test_a_record_without_an_answer_left_is_skipped(chat):
    loaded = make([record(3)], chat, batch_size=1, max_length=5)[0]
    assert loaded.batch is None
    assert loaded.skipped == [
        "data.jsonl:3: no word of an answer lies within 5 tokens; raise --max-length"
    ]
