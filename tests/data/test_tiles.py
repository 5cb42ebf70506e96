"""Images cut into tiles, from the file to the loss: placeholders and tiles agree everywhere, and no
file is read needlessly."""

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFile

from nanovlm.data.batches import Batches, BatchOptions, RecordEncoder
from nanovlm.data.collate import prepare
from nanovlm.data.records import Record
from nanovlm.data.workers import Loading
from nanovlm.errors import NanoVLMError
from nanovlm.evaluation import answers
from nanovlm.evaluation.answers import answer_records
from nanovlm.generate import generate
from nanovlm.hub.models import load_model, save_model
from nanovlm.inputs.chat import IMAGE, ImageTokens, Message
from nanovlm.inputs.image import image_pixels, open_image
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training import features as caching
from nanovlm.training.features import compute_features
from nanovlm.training.precision import Precision
from tests.inputs.test_image import random_image
from tests.reference.models import tiny_vlm

TILES = ImageConfig(28, 28, fit="tiles", max_tiles=3)
SHAPES = {"square": (60, 60), "wide": (90, 20), "tall": (10, 70), "photo": (64, 48), "dot": (1, 1)}
GRIDS = {
    "square": (3, 3),
    "wide": (1, 3),
    "tall": (3, 1),
    "photo": (3, 3),
    "dot": (3, 3),
    "turned": (3, 1),
}
LENGTH = 4  # visual tokens of a tile


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> VisionLanguageModel:
    return tiny_vlm(tmp_path_factory.mktemp("vlm"), image=TILES, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> dict[str, Path]:
    """Files of SHAPES, and a wide one that its EXIF turns upright, which is a member of a tar
    file."""
    folder = tmp_path_factory.mktemp("images")
    paths = {name: folder / f"{name}.png" for name in SHAPES}
    for seed, (name, path) in enumerate(paths.items()):
        random_image(*SHAPES[name], seed).save(path)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    random_image(90, 20).save(turned, "JPEG", exif=exif)
    with tarfile.open(folder / "images.tar", "w") as tar:
        member = tarfile.TarInfo("turned.jpg")
        member.size = len(turned.getvalue())
        tar.addfile(member, io.BytesIO(turned.getvalue()))
    return paths | {"turned": Path(f"{folder / 'images.tar'}::turned.jpg")}


def record(number: int, *images: Path, answer: str = "") -> Record:
    question = Message("user", (*[part for _ in images for part in (IMAGE, "\n")], "What is left?"))
    return Record(
        f"data.jsonl:{number}",
        images,
        (question, Message.parse("assistant", answer or f"number {number}")),
        (),
        {},
    )


def make(model, records: list[Record], image=None, features=None, **settings) -> Batches:
    defaults = dict(batch_size=len(records), max_length=1000, shuffle=False)
    encoder = RecordEncoder(model.chat, image or model.config.image, model.image_length)
    return Batches(records, encoder, BatchOptions(**defaults | settings), features)


@pytest.mark.parametrize(
    "names", [[name] for name in GRIDS] + [["wide", "tall"], ["dot", "turned", "wide", "wide"], []]
)
def test_training_and_asking_take_the_same_ids_and_bytes(model, images, names):
    paths = [images[name] for name in names]
    trained = make(model, [record(0, *paths)])[0].batch
    opened = [open_image(path) for path in paths]
    tokens = [model.image_tokens(*image.size) for image in opened]
    assert tokens == [ImageTokens(LENGTH, *GRIDS[name]) for name in names]
    prompt = model.chat.encode(
        record(0, *paths).messages[:1], tokens, add_generation_prompt=True
    ).input_ids
    assert trained.input_ids[0, : len(prompt)].tolist() == prompt
    num_tiles = sum(image.num_tiles for image in tokens)
    assert (
        len(trained.image_positions)
        == prompt.count(model.chat.image_token_id)
        == LENGTH * num_tiles
    )
    if names:
        assert torch.equal(
            trained.pixels, torch.cat([image_pixels(image, TILES) for image in opened])
        )
        assert len(trained.pixels) == num_tiles
    assert model(trained).isfinite()


def test_the_evaluation_asks_with_them_too(model, images, monkeypatch):
    """Also where another image, of another grid, takes the place of a record's own."""
    batches = []
    monkeypatch.setattr(answers, "generate", lambda *all: batches.append(all[1]) or generate(*all))
    records = [record(0, images["wide"]), record(1, images["square"], images["tall"]), record(2)]
    for control in ("none", "shuffled"):
        assert len(list(answer_records(model, records, max_new_tokens=2, control=control))) == 3
    assert [len(batch.pixels) for batch in batches] == [4 + 10 + 4] * 2
    for batch in batches:
        assert len(batch.image_positions) == LENGTH * len(batch.pixels)
    own = [
        int((row == model.chat.image_token_id).sum()) // LENGTH
        for batch in batches
        for row in batch.input_ids
    ]
    assert own[:3] == [4, 14, 0] and own[3:] in ([4, 14, 0], [10, 8, 0])


@torch.inference_mode()
def test_kept_features_give_the_same_loss(model, images, tmp_path):
    records = [record(number, path) for number, path in enumerate(images.values())]
    precision = Precision(torch.float32, torch.device("cpu"))
    features, _ = compute_features(model, images.values(), precision)
    assert {name: len(features[path]) for name, path in images.items()} == {
        name: rows * columns + 1 for name, (rows, columns) in GRIDS.items()
    }
    kept, seen = make(model, records, features=features)[0].batch, make(model, records)[0].batch
    assert kept.pixels is None and kept.patches.shape == (len(seen.pixels), 16, 24)
    assert float(model(kept)) == pytest.approx(float(model(seen)), rel=1e-6)


@torch.inference_mode()
def test_features_are_the_same_bits_by_any_number_of_workers(model, images, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    precision = Precision(torch.float32, torch.device("cpu"))
    paths = [*images.values(), broken]
    (here, reasons), (there, others) = (
        compute_features(model, paths, precision, Loading(workers)) for workers in (0, 2)
    )
    assert here.keys() == there.keys() == set(images.values())
    assert reasons == others and "not an image" in reasons[broken]
    assert all(torch.equal(here[path], there[path]) for path in here)


@torch.inference_mode()
def test_a_gpu_encodes_64_tiles_at_once_and_a_cpu_8(model, images, monkeypatch):
    sizes, encode = [], model.vision_features
    monkeypatch.setattr(
        model, "vision_features", lambda pixels: (sizes.append(len(pixels)), encode(pixels))[1]
    )
    precision, features = Precision(torch.float32, torch.device("cpu")), []
    for device in ("cpu", "cuda"):  # a CPU that encodes as many as a GPU
        monkeypatch.setitem(caching.ENCODED_AT_ONCE, "cpu", caching.ENCODED_AT_ONCE[device])
        features.append(compute_features(model, images.values(), precision)[0])
    tiles = sum(rows * columns + 1 for rows, columns in GRIDS.values())
    assert sizes == [8] * (tiles // 8) + [tiles % 8] + [tiles]
    few, many = features
    for path in few:
        torch.testing.assert_close(few[path], many[path], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "layout", [dict(share=4), dict(pack=900), dict(pack=900, share=4), dict(bucket=2, batch_size=6)]
)
@torch.inference_mode()
def test_rows_that_are_shared_packed_or_sorted_have_the_same_loss(model, images, layout):
    records = [
        record(number, images[name], answer=f"the {number}. circle")
        for number, name in enumerate(["wide"] * 4 + ["square"] * 2 + ["tall"] * 3)
    ] + [record(9, images["tall"], images["wide"]), record(10), record(11)]
    plain = make(model, records)[0]
    batches = make(model, records, **{"bucket": 1} | layout)
    laid_out = [batches[number] for number in range(layout.get("bucket", 1))]
    assert sum(loaded.samples for loaded in laid_out) == 12 and not any(
        loaded.skipped for loaded in laid_out
    )
    for loaded in laid_out:
        assert len(loaded.batch.image_positions) == LENGTH * len(loaded.batch.pixels)
    assert sum(float(model(loaded.batch)) for loaded in laid_out) == pytest.approx(
        float(model(plain.batch)), rel=1e-5
    )
    if layout.get("share"):
        assert sum(len(loaded.batch.pixels) for loaded in laid_out) < len(plain.batch.pixels)


def test_an_image_is_never_cut_between_its_tiles(model, images):
    batch = make(model, [record(0, images["wide"])])[0].batch
    end = int(batch.image_positions[-1]) + 1
    for limit in (end - 1, end - LENGTH, int(batch.image_positions[0]) + 1):
        loaded = make(model, [record(0, images["wide"])], max_length=limit)[0]
        assert (
            loaded.batch is None
            and "an image is never cut; raise --max-length" in loaded.skipped[0]
        )


def test_an_unreadable_image_is_skipped_and_named(model, images, tmp_path):
    header, rest = tmp_path / "header.png", tmp_path / "rest.png"
    header.write_bytes(images["photo"].read_bytes()[:20])
    rest.write_bytes(images["photo"].read_bytes()[:-2000])
    missing = Path(str(images["turned"]).replace("turned", "missing"))
    records = [
        record(0, images["photo"]),
        record(1, header),
        record(2, rest),
        record(3, images["wide"], missing),
    ]
    for layout in ({}, dict(pack=1000), dict(bucket=1, share=2)):
        loaded = make(model, records, **layout)[0]
        assert loaded.records == ["data.jsonl:0"] and len(loaded.batch.pixels) == 10
        assert sorted(reason.split(": ")[:2] for reason in loaded.skipped) == [
            [f"data.jsonl:{number}", str(path)]
            for number, path in ((1, header), (2, rest), (3, missing))
        ]


def test_sizes_are_read_from_headers_and_only_for_tiles(model, images, monkeypatch):
    records = [record(0, images["photo"]), record(1, images["turned"])]
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    tiled = make(model, records, pack=1000)
    assert len(tiled._lay_out(0).batches[0]) > 0
    monkeypatch.setattr("nanovlm.data.batches.image_size", lambda path: pytest.fail("read"))
    whole = make(model, records, image=ImageConfig(28, 28), pack=1000)
    assert len(whole._lay_out(0).batches[0]) > 0
    with pytest.raises(pytest.fail.Exception, match="read"):
        tiled._lay_out(0)


def test_too_few_and_too_many_tiles_are_refused_with_both_numbers(model, images):
    batch = make(model, [record(0, images["wide"])])[0].batch
    for pixels in (batch.pixels[:3], batch.pixels.repeat(2, 1, 1, 1)):
        tiles = f"{len(pixels)} tiles of 4 visual tokens fill {4 * len(pixels)};"
        with pytest.raises(NanoVLMError, match=f"16 image placeholders, and {tiles}"):
            model(dataclasses.replace(batch, pixels=pixels))


def test_a_folder_keeps_its_tiles(model, images, tmp_path):
    save_model(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["image"]["max_tiles"] == 3
    again = load_model(tmp_path)
    assert again.config.image == TILES and again.image_tokens(90, 20) == ImageTokens(LENGTH, 1, 3)
    assert again.max_image_length == 10 * LENGTH
    question, opened = [Message("user", (IMAGE,))], [open_image(images["wide"])]
    batch = prepare(again, [question], [opened], add_generation_prompt=True)
    assert len(batch.pixels) == 4
    assert generate(again, batch, 3) == generate(model, batch, 3)
