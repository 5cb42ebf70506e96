"""Packed, sorted and dealt batches: the same records, the same loss and gradients, whoever prepares
them."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanovlm.data.batches import Batches, BatchOptions, LoadedBatch, RecordEncoder
from nanovlm.data.packing import cut_by_length, deal, first_fit_decreasing, join
from nanovlm.data.records import Record, read_records
from nanovlm.data.sequences import TokenSequence
from nanovlm.data.workers import Loading
from nanovlm.hub.models import load_model
from nanovlm.inputs.chat import IGNORED, Message
from nanovlm.model.vlm import VisionLanguageModel
from tests.data.test_batches import assert_same

MODES = {
    "plain": {},
    "bucket": {"bucket": 3},
    "packed": {"pack": 160},
    "packed, bucket": {"pack": 160, "bucket": 3},
}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())


def row(length: int, records: int = 1, name: str = "") -> TokenSequence:
    return TokenSequence(
        [1] * length,
        [IGNORED] * length,
        [1] * length,
        (),
        tuple(f"{name}{number}" for number in range(records)),
    )


def lengths(lines: list[list[TokenSequence]]) -> list[list[int]]:
    return [[len(row) for row in line] for line in lines]


def test_first_fit_decreasing():
    rows = [row(length) for length in (4, 8, 1, 4, 2, 1)]
    assert lengths(first_fit_decreasing(rows, 10)) == [[8, 2], [4, 4, 1, 1]]
    assert first_fit_decreasing([], 10) == []
    assert lengths(first_fit_decreasing([row(10), row(10)], 10)) == [[10], [10]]


def test_first_fit_decreasing_loses_no_row_and_leaves_little_room():
    generator = random.Random(0)
    rows = [row(generator.randint(20, 300)) for _ in range(400)]
    lines = first_fit_decreasing(rows, 1024)
    assert Counter(id(row) for line in lines for row in line) == Counter(map(id, rows))
    filled = [sum(line) for line in lengths(lines)]
    assert max(filled) <= 1024 and sum(filled) / (1024 * len(lines)) > 0.97


def test_join_numbers_segments_and_keeps_branches():
    first = TokenSequence(
        [5, 6, 7, 8], [IGNORED, IGNORED, 7, 8], [1, 1, 2, 3], (Path("a"),), ("one", "two")
    )
    second = TokenSequence([9, 10], [IGNORED, 10], [1, 1], (Path("b"),), ("three",))
    assert join([first, second]) == TokenSequence(
        [5, 6, 7, 8, 9, 10],
        [IGNORED, IGNORED, 7, 8, IGNORED, 10],
        [1, 1, 2, 3, 65537, 65537],
        (Path("a"), Path("b")),
        ("one", "two", "three"),
    )
    assert join([first]) is first


def test_cut_by_length_counts_records():
    lines = [
        [row(length, records)]
        for length, records in ((9, 4), (1, 1), (2, 1), (8, 4), (3, 1), (4, 1))
    ]
    assert [lengths(batch) for batch in cut_by_length(lines, 3)] == [
        [[1], [2], [3], [4]],
        [[8]],
        [[9]],
    ]
    assert list(map(len, cut_by_length([[row(1)]] * 12, 4))) == [3] * 4
    # No batch is empty.
    assert list(map(len, cut_by_length([[row(1, 9)], *[[row(2)]] * 3], 4))) == [1] * 4
    assert list(map(len, cut_by_length([[row(1)]] * 2, 3))) == [1, 1, 0]
    assert cut_by_length([], 2) == [[], []]


def test_deal_gives_alike_numbers_of_tokens_and_halves_rows_where_there_are_too_few():
    hands = deal([[row(length)] for length in (7, 1, 5, 3, 6, 2)], 2)
    assert [sum(map(sum, lengths(hand))) for hand in hands] == [12, 12]
    hands = deal([[row(4), row(3), row(2)], [row(1)]], 4)
    assert sorted(map(lengths, hands)) == [[[1]], [[2]], [[3]], [[4]]]
    assert list(map(len, deal([[row(4)]], 3))) == [1, 0, 0] and deal([], 2) == [[], []]


@pytest.fixture(scope="module")
def model(tiny) -> VisionLanguageModel:
    return load_model(tiny.model, torch.float32)


@pytest.fixture(scope="module")
def records(tiny) -> list[Record]:
    """Forty of the scenes' records, some without an image and one of two images, of unequal
    lengths."""
    records = read_records(tiny.data / "train.jsonl")[0][:40]
    images = sorted({record.images[0] for record in records})
    text = [
        Record(
            f"text:{number}",
            (),
            (Message.parse("user", "a?" * number), Message.parse("assistant", "yes " * number)),
            (),
            {},
        )
        for number in range(1, 8)
    ]
    both = Record(
        "both:1",
        tuple(images[:2]),
        (Message.parse("user", "<image> or <image>?"), Message.parse("assistant", "b")),
        (),
        {},
    )
    return [*records, *text, both]


def make(model: VisionLanguageModel, records: list[Record], **settings) -> Batches:
    options = BatchOptions(**dict(batch_size=8, share=4, max_length=150) | settings)
    return Batches(records, RecordEncoder.of(model), options)


def loss_and_gradients(model: VisionLanguageModel, loaded: list[LoadedBatch]) -> dict[str, Tensor]:
    """Of all batches together, per labelled token."""
    model.train().zero_grad()
    batches = [item.batch for item in loaded if item.batch is not None]
    count = sum(len(batch.targets) for batch in batches)
    loss = sum(model(batch) for batch in batches) / count
    loss.backward()
    return {"loss": loss.detach()} | {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("share", [1, 4])
@pytest.mark.parametrize("mode", list(MODES.values())[1:], ids=list(MODES)[1:])
def test_loss_and_every_gradient_equal_those_of_a_row_each(model, records, mode, share):
    # One bucket is one epoch.
    size = len(records) // 3 if "bucket" in mode else len(records)
    batches = make(model, records, batch_size=size, share=share, **mode)
    ours = [batches[number] for number in range(mode.get("bucket", 1))]
    plain = [make(model, records, batch_size=len(records), share=1)[0]]
    assert sorted(name for item in ours for name in item.records) == sorted(plain[0].records)
    if "pack" in mode:
        assert sum(len(item.batch.input_ids) for item in ours) < len(records) / 2
    got, expected = loss_and_gradients(model, ours), loss_and_gradients(model, plain)
    assert got.keys() == expected.keys() and len(got) > 30
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_packed_sample_does_not_depend_on_its_neighbours(model, records):
    """Changing one sample of a row changes no logit of another's."""
    loaded = make(model, records[:6], batch_size=6, share=1, pack=2000)[0]
    batch = loaded.batch
    assert len(batch.input_ids) == 1 and batch.attention_mask.unique().numel() == 6
    with torch.no_grad():
        before = model.language_model.hidden_states(model.embed(batch), batch.attention_mask)
        changed = batch.attention_mask[0] // 2**16 == 2
        batch.pixels[2].neg_()
        batch.input_ids[0, changed & (batch.input_ids[0] != model.chat.image_token_id)] = 7
        after = model.language_model.hidden_states(model.embed(batch), batch.attention_mask)
    assert torch.equal(before[0, ~changed], after[0, ~changed]) and not torch.allclose(
        before[0, changed], after[0, changed]
    )


@every_mode
@pytest.mark.parametrize("share", [1, 4])
def test_every_record_comes_exactly_once_an_epoch(model, records, mode, share):
    # 48 records: six batches, a whole number of buckets.
    batches = make(model, records, share=share, **mode)
    for epoch in range(2):
        loaded = [batches[number] for number in range(6 * epoch, 6 * epoch + 6)]
        assert sorted(name for item in loaded for name in item.records) == sorted(
            record.where for record in records
        )
        assert all(item.batch is not None and not item.skipped and not item.cut for item in loaded)


@every_mode
@pytest.mark.parametrize("share", [1, 4])
def test_processes_share_each_step_without_overlap(model, records, mode, share):
    alone = make(model, records, batch_size=8, share=share, **mode)
    for world in (2, 4):
        ranks = [
            make(model, records, batch_size=8 // world, share=share, rank=rank, world=world, **mode)
            for rank in range(world)
        ]
        for number in (0, 4, 7):
            parts, whole = [rank[number] for rank in ranks], alone[number]
            assert sorted(name for part in parts for name in part.records) == sorted(whole.records)
            # A prefix may be read once in each process.
            assert sum(part.tokens for part in parts) >= whole.tokens
            assert sum(len(part.batch.targets) for part in parts if part.batch) == len(
                whole.batch.targets
            )


@every_mode
def test_the_processes_losses_add_up_to_that_of_one(model, records, mode):
    whole = loss_and_gradients(model, [make(model, records, **mode)[2]])
    parts = loss_and_gradients(
        model,
        [make(model, records, batch_size=2, rank=rank, world=4, **mode)[2] for rank in range(4)],
    )
    for name, value in whole.items():
        torch.testing.assert_close(
            parts[name], value, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_processes_get_alike_numbers_of_tokens(model, records):
    # The numbers may differ by one row.
    for mode, difference in (({"bucket": 6}, 20), ({"bucket": 6, "pack": 160}, 160)):
        ranks = [
            make(model, records, batch_size=8, share=1, rank=rank, world=2, **mode)
            for rank in range(2)
        ]
        for number in range(3):
            assert abs(ranks[0][number].tokens - ranks[1][number].tokens) <= difference


@every_mode
def test_a_batch_depends_on_the_seed_and_its_number_alone(model, records, mode):
    straight = make(model, records, **mode)
    jumping = make(model, records, **mode)
    expected = [straight[number] for number in range(8)]
    for number in (7, 1, 4, 0, 5):
        assert_same(jumping[number], expected[number])
    other = make(model, records, seed=1, **mode)
    assert [other[number].records for number in range(8)] != [item.records for item in expected]


@every_mode
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with fewer cores
def test_any_number_of_workers_prepares_the_same(model, records, mode):
    batches = make(model, records, **mode)
    expected = [batches[number] for number in range(2, 8)]
    for workers in (0, 1, 3):
        prepared = list(make(model, records, **mode).loader(2, 8, Loading(workers)))
        assert len(prepared) == 6
        for ours, theirs in zip(prepared, expected):
            assert_same(ours, theirs)


def test_sorting_and_packing_leave_less_padding(model, records):
    def fill(**settings) -> float:
        loaded = [make(model, records, share=1, **settings)[number] for number in range(6)]
        return sum(item.tokens for item in loaded) / sum(item.slots for item in loaded)

    plain, sorted_by_length, packed = fill(), fill(bucket=6), fill(pack=160, bucket=6)
    assert plain < 0.6 and sorted_by_length > 0.75 and packed > 0.9


def test_the_batches_of_a_bucket_are_not_in_order_of_length(model, records):
    firsts = {
        min(range(6), key=lambda number: make(model, records, bucket=6, seed=seed)[number].slots)
        for seed in range(8)
    }
    assert len(firsts) > 2


def test_tokens_slots_and_images_are_those_of_the_batch(model, records):
    for mode in MODES.values():
        loaded = make(model, records, **mode)[0]
        assert loaded.slots == loaded.batch.input_ids.numel() and loaded.images == len(
            loaded.batch.pixels
        )
        assert loaded.tokens == int((loaded.batch.attention_mask > 0).sum())


@pytest.mark.parametrize("pack", [60, 100, 1000])
def test_no_row_is_longer_than_pack(model, records, pack):
    """A sample that is longer is cut as by --max-length, and samples that share a prefix part where
    they would be."""
    batches = make(model, records, share=8, batch_size=48, pack=pack, max_length=1000)
    loaded = batches[0]
    assert loaded.batch.input_ids.shape[1] <= pack
    assert len(loaded.records) + len(loaded.skipped) == 48
    plain = make(model, records, share=8, batch_size=48, max_length=pack)[0]
    assert sorted(loaded.cut) == sorted(plain.cut) and bool(loaded.cut) == (pack == 60)
    assert all(reason.endswith("raise --pack") for reason in loaded.skipped)


def test_where_there_are_fewer_rows_than_processes_rows_are_parted_until_there_are_no_more(
    model, records
):
    batches = [
        make(model, records[:2], share=1, batch_size=1, pack=1000, rank=rank, world=2)[0]
        for rank in range(2)
    ]
    assert [len(item.records) for item in batches] == [1, 1]
    shared = [
        make(model, records[:1] * 2, share=2, batch_size=1, pack=1000, rank=rank, world=2)[0]
        for rank in range(2)
    ]
    assert [len(item.records) for item in shared] == [2, 0] and shared[1] == LoadedBatch(None)


@pytest.mark.parametrize(
    "mode", [{"bucket": 4}, {"pack": 1000, "bucket": 4}], ids=["bucket", "packed"]
)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_no_batch_is_empty_where_few_rows_hold_all(model, records, mode, batch_size):
    batches = make(model, [records[0]] * 8, share=8, batch_size=batch_size, **mode)
    assert all(batches[number].batch is not None for number in range(8))


@every_mode
def test_an_unreadable_image_takes_no_other_sample_with_it(model, records, mode, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    bad = Record(
        "bad:1",
        (broken,),
        (Message.parse("user", "<image>"), Message.parse("assistant", "b")),
        (),
        {},
    )
    endless = Record(
        "bad:2", (), (Message.parse("user", "a" * 3000), Message.parse("assistant", "b")), (), {}
    )
    mixed = [*records[:-2], bad, endless]
    loaded = [make(model, mixed, **mode)[number] for number in range(6)]
    assert sorted(name for item in loaded for name in item.records) == sorted(
        record.where for record in mixed[:-2]
    )
    skipped = sorted(reason for item in loaded for reason in item.skipped)
    assert [reason.split(": ")[0] for reason in skipped] == [
        "bad:1",
        "bad:2",
    ] and "no word of an answer" in skipped[1]


@every_mode
def test_unshuffled_records_come_once(model, records, mode):
    batches = make(model, records[:43], shuffle=False, **mode)
    assert len(batches) == 6
    loaded = [batches[number] for number in range(6)]
    assert sorted(name for item in loaded for name in item.records) == sorted(
        record.where for record in records[:43]
    )
    assert all(item.batch is not None for item in loaded)


def test_a_packed_run_has_the_losses_of_an_unpacked_one(tiny, tmp_path):
    """Through the settings: with a bucket of one batch, each step has the same records, so the same
    loss."""
    lines = []
    for name, packed in (("plain", {}), ("packed", {"pack": 300, "workers": 1})):
        run = tiny.train(
            tmp_path / name,
            init=str(tiny.model),
            train="projector,language_model,vision_encoder",
            batch_size=12,
            share=1,
            **packed,
        )
        lines.append(
            [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        )
    for plain, packed in zip(*lines, strict=True):
        assert (
            packed["loss"] == pytest.approx(plain["loss"], abs=1e-5)
            and packed["tokens"] == plain["tokens"]
        )
    assert lines[0][-1]["val_loss"] == pytest.approx(lines[1][-1]["val_loss"], abs=1e-5)
