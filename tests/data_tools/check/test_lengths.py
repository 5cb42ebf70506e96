"""Lengths in tokens: those of training, what it cuts, and what packing saves."""

import json

import pytest

from data_tools.check.lengths import Length, encoder_of, measure_lengths, percentiles, summarise
from nanovlm.data.batches import Batches, BatchOptions, RecordEncoder
from nanovlm.data.records import read_records
from nanovlm.hub.models import load_model
from nanovlm.inputs.chat import IGNORED


@pytest.fixture(scope="module")
def records(tiny):
    return read_records(tiny.data / "train.jsonl")[0]


@pytest.mark.parametrize("limit", [20, 32, 2048])
def test_they_are_those_of_the_batches_of_a_run(tiny, records, limit):
    encoder = RecordEncoder.of(load_model(tiny.model))
    lengths = list(measure_lengths(records, encoder, limit, workers=0))
    batches = Batches(records, encoder, BatchOptions(1, limit, shuffle=False))
    tokens = answers = cut = skipped = 0
    for loaded in batches.loader(0, len(batches)):
        tokens += loaded.tokens
        answers += 0 if loaded.batch is None else len(loaded.batch.targets)
        cut += len(loaded.cut)
        skipped += len(loaded.skipped)
    used = [length for length in lengths if not length.skipped]
    assert sum(min(length.tokens, limit) for length in used) == tokens
    assert sum(length.kept_answer for length in used) == answers
    told = summarise(lengths, limit)
    assert (told["cut_records"], told["skipped_records"]) == (cut, skipped)
    assert told["lost_answer_tokens"] == sum(length.answer for length in lengths) - answers


def test_a_tokenizer_alone_counts_so_many_tokens_an_image(tiny, records):
    encoder = encoder_of(None, tiny.language_model, image_tokens=4)
    model = load_model(tiny.model)
    for record in records[:20]:
        (length,) = measure_lengths([record], encoder, 2048, workers=0)
        whole, _ = RecordEncoder.of(model).encode(record, BatchOptions(1, 2048))
        images = len(record.images)
        assert length.tokens == len(whole) + (4 - model.image_length) * images
        assert length.answer == sum(label != IGNORED for label in whole.labels)


def test_they_do_not_depend_on_the_number_of_workers(tiny, records):
    encoder = RecordEncoder.of(load_model(tiny.model))
    assert list(measure_lengths(records, encoder, 32, 2)) == list(
        measure_lengths(records, encoder, 32, 0)
    )


def test_padding_of_rows_that_fill_one_another():
    """Half of the rows have 48 tokens and half have 16: packed into 64, nothing is padding."""
    told = summarise([Length(48, 1, 1), Length(16, 1, 1)] * 512, 64)
    assert told["padding"]["pack"] == 0 and told["padding"]["bucket"] == 0
    assert told["padding"]["plain"] == pytest.approx(1 - 32 / 48, abs=0.01)


def test_no_record_no_figures():
    assert summarise([Length(skipped="x")], 64)["tokens"] == {}
    assert json.dumps(summarise([], 64)) and percentiles([]) == {}


def test_percentiles_are_values():
    found = percentiles(range(101))
    assert (found["p0"], found["p5"], found["p50"], found["p100"]) == (0, 5, 50, 100)
    assert found["mean"] == 50 and found["sum"] == 5050
