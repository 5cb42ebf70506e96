"""Pairs: their forms, what is refused, and one row for both answers that equals a row each."""

import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch

from nanovlm.data.batches import Batches, BatchOptions, RecordEncoder
from nanovlm.data.preferences import PairBatch, PairEncoder, read_pairs
from nanovlm.data.records import read_records
from nanovlm.data.workers import Loading
from nanovlm.errors import NanoVLMError
from nanovlm.hub.models import load_model
from nanovlm.inputs.chat import IMAGE, Message
from nanovlm.model.loss import token_log_probabilities
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.objectives.preferences import answer_log_probabilities
from tests.data.test_records import write

PAIR = {"image": "a.jpg", "prompt": "几个？", "chosen": "三个。", "rejected": "两个。"}
TURNS = [
    {"role": "user", "content": "<image>?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "How many?"},
]
SEVERAL = {"image": "a.jpg", "messages": TURNS, "chosen": "Three.", "rejected": "Two."}
LLAVA = {
    "conversations": [{"from": "human", "value": "Hi"}],
    "chosen": "Hello.",
    "rejected": "No.",
    "id": 7,
}


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"an image, which is not opened here")
    return tmp_path


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl"])
def test_all_forms_are_read(folder, name):
    two = PAIR | {"image": ["a.jpg", "b.jpg"]}
    placed = PAIR | {"prompt": "几个 <image> ？"}
    pairs, skipped = read_pairs(write(folder / name, [PAIR, SEVERAL, LLAVA, two, placed]))
    assert skipped == []
    assert [pair.messages[-1].content + (pair.rejected,) for pair in pairs] == [
        ("三个。", "两个。"),
        ("Three.", "Two."),
        ("Hello.", "No."),
        ("三个。", "两个。"),
        ("三个。", "两个。"),
    ]
    assert pairs[0].messages[0] == Message("user", (IMAGE, "\n几个？")) and pairs[0].images == (
        folder / "a.jpg",
    )
    assert len(pairs[1].messages) == 4 and pairs[2].images == () and pairs[2].extra == {"id": 7}
    assert (
        pairs[3].messages[0] == Message("user", (IMAGE, IMAGE, "\n几个？"))
        and len(pairs[3].images) == 2
    )
    assert pairs[4].messages[0] == Message("user", ("几个 ", IMAGE, " ？"))


def turn(text: str, **keys) -> dict:
    return {"role": "assistant", "content": text, **keys}


ASKED = {"role": "user", "content": "Hi"}
SAME = {
    "answers that are turns": LLAVA
    | {"chosen": {"from": "gpt", "value": "Hello."}, "rejected": {"from": "gpt", "value": "No."}},
    "TRL": {"prompt": [ASKED], "chosen": [turn("Hello.")], "rejected": [turn("No.")]},
    "TRL, with the question in both": {
        "chosen": [ASKED, turn("Hello.")],
        "rejected": [ASKED, turn("No.")],
    },
    "UltraFeedback": {
        "prompt": "Hi",
        "prompt_id": "a",
        "chosen": [ASKED, turn("Hello.")],
        "rejected": [ASKED, turn("No.")],
        "messages": [ASKED, turn("Hello.")],
        "score_chosen": 7.5,
    },
    "a prompt of turns, with the question in both": {
        "prompt": [ASKED],
        "chosen": [ASKED, turn("Hello.")],
        "rejected": [ASKED, turn("No.")],
    },
    "ms-swift": {"messages": [ASKED, turn("Hello.")], "rejected_response": "No."},
    "ms-swift, a query": {"query": "Hi", "response": "Hello.", "rejected_response": "No."},
    "LLaMA-Factory": {"instruction": "Hi", "input": "", "chosen": "Hello.", "rejected": "No."},
    "null columns": LLAVA | {"messages": None, "prompt": None, "image": None},
}


@pytest.mark.parametrize("entry", SAME.values(), ids=SAME.keys())
def test_the_same_pair_in_every_published_form(folder, entry):
    (pair,), _ = read_pairs(write(folder / "pairs.jsonl", [entry]))
    assert pair.messages == (Message("user", ("Hi",)), Message("assistant", ("Hello.",)))
    assert pair.rejected == "No."


BAD = {
    "not JSON": ("{", "is not valid JSON"),
    "no rejected": ({"prompt": "a", "chosen": "b"}, "has no text in 'rejected'"),
    "blank chosen": (PAIR | {"chosen": " \n"}, "has no text in 'chosen'"),
    "a number": (PAIR | {"rejected": 3}, "has no text in 'rejected'"),
    "the same": (PAIR | {"rejected": "三个。 "}, "chosen and rejected are the same"),
    "no prompt": (
        {"chosen": "a", "rejected": "b"},
        "the turn before the answers is not the user's",
    ),
    "two prompts": (PAIR | {"messages": TURNS}, "has messages and prompt"),
    "a prompt that is a number": (PAIR | {"prompt": 3}, "has a part 3, expected text"),
    "a missing image": (PAIR | {"image": "c.jpg"}, "c.jpg does not exist"),
    "more markers than images": (
        PAIR | {"prompt": "<image><image>"},
        "has 2 <image> markers and the record 1 images",
    ),
    "an answer before the answers": (
        SEVERAL | {"messages": TURNS[:2]},
        "the turn before the answers is not the user's",
    ),
    "two questions": (
        {"chosen": [ASKED, turn("a")], "rejected": [TURNS[0], turn("b")], "image": "a.jpg"},
        "the text has 0 <image> markers",
    ),
    "another prompt": (
        {"prompt": "a", "chosen": [ASKED, turn("a")], "rejected": [ASKED, turn("b")]},
        "has messages and prompt; it is not clear",
    ),
    "other messages": (
        {"messages": TURNS, "chosen": [ASKED, turn("a")], "rejected": [ASKED, turn("b")]},
        "has messages and conversations; it is not clear",
    ),
    "another question": (
        {"chosen": [ASKED, turn("a")], "rejected": [TURNS[2], turn("b")]},
        "chosen and rejected do not answer the same question",
    ),
    "an answer that is not to be learned": (
        {"prompt": "x", "chosen": turn("a", weight=0), "rejected": "b"},
        "none of its answers is to be learned",
    ),
    "no turns": (
        {"messages": [], "chosen": "a", "rejected": "b"},
        "the turn before the answers is not the user's",
    ),
}


@pytest.mark.parametrize("entry, reason", BAD.values(), ids=BAD.keys())
def test_a_bad_pair_is_skipped_and_named_with_its_line(folder, entry, reason):
    path = write(folder / "pairs.jsonl", [LLAVA] * 50 + [entry] + [LLAVA] * 49)
    pairs, skipped = read_pairs(path)
    assert len(pairs) == 99 and len(skipped) == 1
    assert skipped[0].startswith(f"{path}:51: ") and reason in skipped[0] and "\n" not in skipped[0]


@pytest.fixture(scope="module")
def model(tiny) -> VisionLanguageModel:
    return load_model(tiny.model)


@pytest.fixture(scope="module")
def pairs(tiny, tmp_path_factory) -> list:
    """Pairs with one image, two and none, of one turn and several, and of unequal lengths."""
    images = [
        json.loads(line)["image"]
        for line in (tiny.data / "train.jsonl").read_text().splitlines()[::9]
    ]
    entries = []
    for number, image in enumerate(images):
        entries += [
            {
                "image": image,
                "prompt": "描述图片",
                "chosen": "三个。" * (number + 1),
                "rejected": "三个圆形。",
            },
            {
                "image": [image, images[0]],
                "prompt": "<image> or <image>?",
                "chosen": "a",
                "rejected": "b" * number or "c",
            },
            {"prompt": "你好", "chosen": "a", "rejected": "ab"},
            SEVERAL | {"image": image},
        ]
    return read_pairs(write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", entries), tiny.data)[
        0
    ]


def make(model: VisionLanguageModel, records, encoder=None, **settings) -> Batches:
    defaults = dict(batch_size=4, share=8, max_length=500, shuffle=False)
    encoder = encoder or PairEncoder(RecordEncoder.of(model))
    return Batches(records, encoder, BatchOptions(**defaults | settings))


@torch.no_grad()
def expected(model: VisionLanguageModel, record) -> list[float]:
    """Both answers' log-probabilities in rows of their own, written out."""
    sums = []
    for text in (record.messages[-1].content[0], record.rejected):
        messages = (*record.messages[:-1], Message("assistant", (text,)))
        single = dataclasses.replace(record, messages=messages)
        loaded = make(model, [single], RecordEncoder.of(model))[0].batch
        logits = (
            model.language_model(loaded.input_ids)
            if loaded.pixels is None
            else model.language_model.logits(
                model.language_model.hidden_states(model.embed(loaded))
            )
        )
        answer = model.tokenizer.encode(text) + [model.chat.end_of_turn_id]
        end = loaded.input_ids.shape[1]  # the plain template puts nothing after it
        assert loaded.input_ids[0, end - len(answer) :].tolist() == answer
        places = range(end - len(answer), end)
        sums.append(
            sum(
                float(logits[0, place - 1].log_softmax(-1)[token])
                for place, token in zip(places, answer)
            )
        )
    return sums


@pytest.mark.parametrize(
    "mode", [{}, {"bucket": 3}, {"pack": 200}, {"pack": 200, "bucket": 2}], ids=str
)
def test_a_pair_in_one_row_has_the_log_probabilities_of_rows_of_its_own(model, pairs, mode):
    right = {record.where: expected(model, record) for record in pairs}
    seen = []
    batches = make(model, pairs, **mode)
    for number in range(len(batches)):
        loaded = batches[number]
        assert type(loaded.batch) is PairBatch and len(loaded.batch.lengths) == 2 * loaded.samples
        with torch.no_grad():
            ours = answer_log_probabilities(model, loaded.batch)
        torch.testing.assert_close(
            ours, torch.tensor([right[where] for where in loaded.records]), atol=1e-5, rtol=1e-5
        )
        seen += loaded.records
    assert sorted(seen) == sorted(right)


def test_a_pair_reads_its_image_once(model, pairs):
    loaded = make(model, pairs, batch_size=1)[0]
    assert loaded.images == loaded.samples == 1 and loaded.batch.input_ids.shape[0] == 1
    assert int((loaded.batch.input_ids == model.chat.image_token_id).sum()) == model.image_length


def test_only_the_last_answer_is_labelled(model, pairs):
    loaded = make(model, [pairs[3]], batch_size=1)[0]
    text = model.tokenizer.decode(loaded.batch.targets.tolist())
    assert "Three" in text and "Two" in text and "Yes" not in text


def test_targets_go_through_the_head_and_nothing_else_does(model, pairs):
    batch = make(model, pairs)[0].batch
    shapes = []
    model(
        batch,
        lambda hidden, *rest: shapes.append(hidden.shape) or token_log_probabilities(hidden, *rest),
    )
    assert shapes == [(int(batch.lengths.sum()), 16)]


def test_what_is_too_long_is_cut_or_skipped_and_named(model, pairs):
    record = dataclasses.replace(
        pairs[2], messages=(pairs[2].messages[0], Message("assistant", ("a" * 300,)))
    )
    loaded = make(model, [record], max_length=60)[0]
    assert loaded.cut == [record.where] and loaded.samples == 1
    alike = dataclasses.replace(record, rejected="a" * 300 + "b")
    (reason,) = make(model, [alike], max_length=60)[0].skipped
    assert (
        reason
        == f"{record.where}: chosen and rejected are the same up to 60 tokens; raise --max-length"
    )
    (reason,) = make(model, [record], pack=200)[0].skipped
    assert "raise --pack" in reason


def test_reference_values_go_with_their_pairs_through_memory_and_workers(model, pairs):
    batches = make(model, pairs, shuffle=True, seed=1)
    batches.encoder.reference = {
        record.where: (-float(number), -number - 0.5) for number, record in enumerate(pairs)
    }
    (loaded,) = list(batches.loader(1, 2, Loading(workers=1)))
    copy = pickle.loads(pickle.dumps(batches))[1]  # for a worker that is spawned
    assert copy.records == loaded.records
    assert torch.equal(copy.batch.reference, loaded.batch.reference)
    numbers = [[record.where for record in pairs].index(where) for where in loaded.records]
    batch = loaded.batch.to("cpu")
    assert type(batch) is PairBatch and batch.reference.tolist() == [
        [-number, -number - 0.5] for number in numbers
    ]
    del batches.encoder.reference[pairs[0].where]
    (reason,) = [reason for number in range(len(batches)) for reason in batches[number].skipped]
    assert "could not be read when the reference" in reason


def test_pairs_are_no_records_for_plain_training(folder):
    with pytest.raises(NanoVLMError, match="has 'chosen', which is not read"):
        read_records(write(folder / "pairs.jsonl", [PAIR]))
