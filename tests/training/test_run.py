"""A run from settings to a finished folder: its files, held-out records, what is refused."""

import itertools
import json
import math
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from PIL import Image

from nanovlm.data.workers import prepare_ahead
from nanovlm.errors import NanoVLMError
from nanovlm.hub.models import load_model
from nanovlm.training import building
from nanovlm.training import run as run_module
from nanovlm.training.building import build_model, projector_and_image
from nanovlm.training.presets import load_settings
from nanovlm.training.run import run_stage
from tests.utils.test_outputs import hold


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    return tiny.train(tmp_path_factory.mktemp("runs") / "finished", save_every=1, keep=3)


@pytest.fixture
def own_data(tiny, tmp_path):
    """A copy of the data to damage: 120 records, so that one bad one stays below 1 %."""
    shutil.copytree(tiny.data, tmp_path / "data")
    path = tmp_path / "data" / "train.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:60]) * 2)
    return path


def test_a_finished_run_holds_all_there_is_to_look_at(tiny, finished):
    assert {path.name for path in finished.iterdir()} == {
        "settings.toml",
        "metrics.jsonl",
        "curves.png",
        "checkpoints",
        "model",
        "samples.jsonl",
        "samples.png",
    }
    assert load_settings("stage1", ["--config", str(finished / "settings.toml")]) == tiny.settings(
        finished, save_every=1, keep=3
    )
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == [
        "step_2",
        "step_3",
        "step_4",
    ]
    load_model(finished / "model")
    for name in ("curves.png", "samples.png"):
        with Image.open(finished / name) as figure:
            figure.load()
            assert (
                figure.width > 500 and len(figure.convert("L").getcolors()) > 10
            )  # something is drawn
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4
    for sample in samples:
        assert (
            list(sample) == ["step", "where", "prompt", "answer", "reference"]
            and sample["step"] == 4
        )
        assert sample["prompt"] and sample["reference"]


def test_every_logged_step_has_the_promised_keys(finished):
    lines = metrics(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and [
        line["samples"] for line in lines
    ] == [4, 8, 12, 16]
    for line in lines:
        assert line.keys() >= {
            "step",
            "loss",
            "lr",
            "grad_norm",
            "samples",
            "tokens",
            "seconds",
            "lr_projector",
        }
    assert all(before["tokens"] < after["tokens"] for before, after in itertools.pairwise(lines))
    assert lines[-1]["val_perplexity"] == pytest.approx(math.exp(lines[-1]["val_loss"]))


def test_kept_features_give_the_same_losses(tiny, finished, tmp_path):
    run = tiny.train(tmp_path / "cached", cache_features=True)
    for line, expected in zip(metrics(run), metrics(finished), strict=True):
        for key in ("loss", "grad_norm", "val_loss"):
            assert line.get(key) == pytest.approx(expected.get(key), abs=1e-5)
    with pytest.raises(NanoVLMError, match="frozen vision encoder"):
        tiny.train(tmp_path / "impossible", cache_features=True, train="vision_encoder")


def test_one_loader_brings_images_to_encode_batches_to_train_on_and_to_validate(
    tiny, finished, tmp_path, monkeypatch
):
    started = []

    def spied(dataset, first, last, loading):
        started.append((type(dataset).__name__, loading.workers))
        return prepare_ahead(dataset, first, last, loading)

    for module in ("nanovlm.data.batches", "nanovlm.training.features"):
        monkeypatch.setattr(f"{module}.prepare_ahead", spied)
    run = tiny.train(tmp_path / "run", workers=1, cache_features=True, val_every=2)
    usable, training, two_validations = [("Batches", 1)], [("Batches", 1)], [("Batches", 1)] * 2
    assert started == [("_Images", 1), *usable, *training, *two_validations]
    for line, expected in zip(metrics(run), metrics(finished), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], abs=1e-5)


def test_the_allocator_is_set_before_the_model_is_allocated(tiny, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(run_module, "reuse_freed_memory", lambda: calls.append("allocator"))
    build = run_module.build_model
    monkeypatch.setattr(
        run_module, "build_model", lambda settings: (calls.append("model"), build(settings))[1]
    )
    tiny.train(tmp_path / "run", max_steps=1)
    assert calls == ["allocator", "model"]


TILES = {
    "image_processor_type": "SmolVLMImageProcessor",
    "size": {"longest_edge": 64},
    "max_image_size": {"longest_edge": 32},
}


def test_a_run_with_tiles_gives_a_model_that_cuts_them(tiny, tmp_path):
    vision = tmp_path / "vision_encoder"
    shutil.copytree(tiny.vision_encoder, vision)
    (vision / "preprocessor_config.json").write_text(json.dumps(TILES))
    losses = []
    for cached in (False, True):
        run = tiny.train(
            tmp_path / f"run{cached}",
            vision_encoder=str(vision),
            cache_features=cached,
            max_steps=2,
        )
        losses.append([line["loss"] for line in metrics(run)])
        model = load_model(run / "model")
        assert model.config.image.fit == "tiles" and model.image_tokens(100, 100).num_tiles == 5
        answered = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
        assert answered and all(line["answer"] is not None for line in answered)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_the_folder_of_a_vision_encoder_says_how_images_are_prepared(tiny, tmp_path):
    square = {"height": 48, "width": 48}
    for written, changes, expected in (
        (
            TILES,
            {},
            {"fit": "tiles", "height": 32, "width": 32, "max_tiles": 2, "resample": "lanczos"},
        ),
        (TILES, {"image_size": 48}, {"fit": "tiles", "max_tiles": 2, **square}),
        (
            {"image_processor_type": "SiglipImageProcessor", "size": square},
            {},
            {"fit": "squash", **square},
        ),
        (
            {"image_processor_type": "CLIPImageProcessor", "size": 48, "crop_size": 48},
            {},
            {"fit": "squash", **square},
        ),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
        image = projector_and_image(
            tiny.settings(tmp_path, vision_encoder=str(tmp_path), **changes)
        )[1]
        assert {
            name: getattr(image, name) for name in expected
        } == expected and image.shortest_edge is None
    (tmp_path / "preprocessor_config.json").rename(
        tmp_path / "processor_config.json"
    )  # as newer folders keep it
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"image_processor": written, "processor_class": "CLIPProcessor"})
    )
    assert projector_and_image(tiny.settings(tmp_path, vision_encoder=str(tmp_path)))[1] == image


def test_parts_beside_a_whole_model_are_said_to_be_unused(tiny, tmp_path, capsys):
    build_model(
        tiny.settings(tmp_path, init=str(tiny.model), vision_encoder="nowhere", projector="linear")
    )
    assert (
        f"--init {tiny.model} is a whole model, "
        "so these have no effect: --vision-encoder, --projector" in capsys.readouterr().err
    )


def test_settings_of_another_objective_are_said_to_be_unused(tiny, tmp_path, capsys):
    build_model(tiny.settings(tmp_path, sft_weight=0.2, beta=0.2, max_words=9))
    assert capsys.readouterr().err.splitlines() == [
        "--objective is sft, so these of dpo have no effect: --beta, --sft-weight",
        "--objective is sft, so these of words have no effect: --max-words",
    ]
    build_model(tiny.settings(tmp_path, objective="words", max_words=9))
    assert "no effect" not in capsys.readouterr().err


def test_steps_that_make_pretrained_weights_forget_are_said(tiny, tmp_path, capsys, monkeypatch):
    changes = {"init": str(tiny.model), "train": "language_model", "lr": 1e-3}
    build_model(tiny.settings(tmp_path, **changes))
    assert "forget" not in capsys.readouterr().err  # a small model from scratch
    monkeypatch.setattr(building, "PRETRAINED_WIDTH", 16)
    build_model(tiny.settings(tmp_path, **changes))
    assert "trained at a rate of 0.001, at which pretrained" in capsys.readouterr().err
    for slow in ({"lr_language_model": 2e-5}, {"train": "projector"}):
        build_model(tiny.settings(tmp_path, **changes | slow))
        assert "forget" not in capsys.readouterr().err


def test_a_folder_that_does_not_say_is_named(tiny, tmp_path, capsys):
    shutil.copytree(tiny.vision_encoder, tmp_path / "encoder")
    (tmp_path / "encoder" / "preprocessor_config.json").unlink()
    build_model(tiny.settings(tmp_path, vision_encoder=str(tmp_path / "encoder")))
    assert (
        "encoder: holds no preprocessor_config.json; images are prepared as for its family, 224×224"
        in capsys.readouterr().err
    )
    build_model(tiny.settings(tmp_path))
    assert capsys.readouterr().err == ""


def test_a_folder_that_holds_something_is_refused_and_stays(tiny, finished, tmp_path):
    before = contents(finished)
    with pytest.raises(NanoVLMError, match="holds another run, which is finished"):
        tiny.train(finished)
    with pytest.raises(NanoVLMError, match="this run is finished"):
        tiny.train(finished, resume=True)
    assert contents(finished) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(NanoVLMError, match="holds notes.txt, which is of no run"):
        tiny.train(tmp_path)
    with pytest.raises(NanoVLMError, match="notes.txt: is not a folder"):
        tiny.train(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    shutil.copytree(finished / "model", tmp_path / "model")
    for out in (tmp_path / "model", tmp_path / "model" / "run"):
        with pytest.raises(NanoVLMError, match="(lies in a folder that|is read by) this command"):
            tiny.train(out, init=str(tmp_path / "model"))
    assert contents(tmp_path / "model") == contents(finished / "model")


def test_a_run_stopped_by_its_data_gives_its_folder_to_the_next(tiny, tmp_path):
    mended = json.loads((tiny.data / "train.jsonl").read_text().splitlines()[0])
    mended["image"] = str(tiny.data / mended["image"])
    (tmp_path / "cut.png").write_bytes(Path(mended["image"]).read_bytes()[:60])
    for name, image in (("bad", str(tmp_path / "cut.png")), ("mended", mended["image"])):
        record = json.dumps(mended | {"image": image}) + "\n"
        (tmp_path / f"{name}.jsonl").write_text(record * 4)
    settings = dict(init=str(tiny.model), val="", val_fraction=0.0, max_steps=1)
    with pytest.raises(NanoVLMError, match="cannot be used"):
        tiny.train(tmp_path / "run", data=str(tmp_path / "bad.jsonl"), **settings)
    run = tiny.train(tmp_path / "run", data=str(tmp_path / "mended.jsonl"), **settings)
    assert (run / "model").is_dir() and len(metrics(run)) == 1
    assert "mended.jsonl" in (run / "settings.toml").read_text()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data": ""}, "no records to train on"),
        ({"vision_encoder": ""}, "nothing to start from"),
        ({"val_fraction": 0.99}, "leaves none"),
        ({"data": "nope.jsonl"}, "nope.jsonl: cannot be read"),
        ({"projector": "magic"}, "projector 'magic' is not known"),
        ({"image_size": 50}, "50×50 pixels is not made of 16-pixel patches"),
        ({"vision_layer": 9}, "layer 9 of a vision transformer"),
    ],
)
def test_what_cannot_start_leaves_no_folder(tiny, tmp_path, changes, expected):
    with pytest.raises(NanoVLMError, match=expected):
        if "val_fraction" in changes:  # two records of one image
            records = (tiny.data / "train.jsonl").read_text().splitlines()[:2]
            (tmp_path / "two.jsonl").write_text("\n".join(records))
            changes = {
                **changes,
                "data": str(tmp_path / "two.jsonl"),
                "images": str(tiny.data),
                "val": "",
            }
        tiny.train(tmp_path / "run", **changes)
    assert not (tmp_path / "run" / "checkpoints").exists()


def text_only(path: Path, count: int) -> str:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    path.write_text((json.dumps({"messages": turns}) + "\n") * count)
    return str(path)


@pytest.mark.parametrize("part", ["projector", "vision_encoder,language_model"])
def test_what_sees_images_is_not_trained_without_any(tiny, tmp_path, part):
    data, run = text_only(tmp_path / "data.jsonl", 8), tmp_path / "run"
    with pytest.raises(NanoVLMError, match="none of the 8 records has an image, and") as caught:
        tiny.train(run, data=data, val="", train=part)
    assert part.split(",")[0] in str(caught.value) and not (run / "metrics.jsonl").exists()
    tiny.train(tmp_path / "text", data=data, val="", train="language_model", max_steps=1)


@pytest.mark.parametrize("flag", ["batch_size", "accumulate"])
def test_a_step_of_the_same_few_records_over_and_over_is_refused(tiny, tmp_path, flag):
    with pytest.raises(NanoVLMError, match="--batch-size × --accumulate = .* more than 100 times"):
        tiny.train(tmp_path / "run", **{flag: 1_000_000})


def test_in_a_small_set_all_broken_images_are_named_with_the_reason(tiny, tmp_path):
    entries = []
    for number in range(12):
        path = tmp_path / f"n{number}.jpg"
        Image.effect_noise((64, 64), 50).convert("RGB").save(path)
        if number % 3 == 1:
            path.write_bytes(path.read_bytes()[:-200])
        turns = [{"from": "human", "value": "<image>\nx"}, {"from": "gpt", "value": "y"}]
        entries.append({"image": path.name, "conversations": turns})
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    for cache in (False, True):
        with pytest.raises(NanoVLMError, match="4 of 12 records cannot be used") as caught:
            tiny.train(
                tmp_path / f"run{cache}",
                data=str(data),
                val="",
                val_fraction=0.0,
                cache_features=cache,
            )
        for number in (1, 4, 7, 10):
            assert f":{number + 1}: {tmp_path}/n{number}.jpg: cannot read" in str(caught.value)
        assert str(caught.value).count("truncated") == 4


def test_one_bad_record_of_many_is_named_and_skipped(tiny, tmp_path, own_data, capsys):
    lines = own_data.read_text().splitlines()
    broken = json.loads(lines[5]) | {"image": "cut.png"}
    (own_data.parent / "cut.png").write_bytes(
        (own_data.parent / json.loads(lines[5])["image"]).read_bytes()[:200]
    )
    own_data.write_text("\n".join([*lines[:5], json.dumps(broken), *lines[6:]]))
    for cache in (False, True):
        tiny.train(
            tmp_path / f"run{cache}",
            data=str(own_data),
            max_steps=35,
            log_every=50,
            cache_features=cache,
            val=str(own_data),
            val_samples=120,
        )
        printed = capsys.readouterr().err
        assert f"skipped: {own_data}:6: " in printed and "cut.png" in printed
        assert "skipped: 1 of 120 records, named above" in printed  # once, though it came up twice


def test_a_missing_image_is_never_a_blank_one_and_above_one_percent_is_too_many(
    tiny, tmp_path, own_data, capsys
):
    lines = own_data.read_text().splitlines()
    missing = json.dumps(json.loads(lines[0]) | {"image": "images/gone.png"})
    own_data.write_text("\n".join([missing, *lines[1:]]))
    tiny.train(tmp_path / "one", data=str(own_data), max_steps=1)
    assert f"skipped: {own_data}:1: image {own_data.parent}/images/gone.png does not exist" in (
        printed := capsys.readouterr().err
    )
    assert "119 records to train on" in printed
    own_data.write_text("\n".join([missing, missing, *lines[2:]]))
    with pytest.raises(
        NanoVLMError,
        match="(?s)2 of 120 records cannot be used, more than 1%.*train.jsonl:1: .*train.jsonl:2: ",
    ):
        tiny.train(tmp_path / "two", data=str(own_data))
    assert not (tmp_path / "two").exists()


def test_records_that_are_cut_are_named(tiny, tmp_path, own_data, capsys):
    lines = own_data.read_text().splitlines()
    long = json.loads(lines[0])
    long["messages"][1]["content"] = "圆形" * 300
    own_data.write_text("\n".join([json.dumps(long), *lines[1:]]))
    tiny.train(tmp_path / "run", data=str(own_data), max_steps=30, log_every=50, max_length=200)
    printed = capsys.readouterr().err
    assert f"cut: {own_data}:1" in printed and "cut: 1 of 120 records, named above" in printed


def test_a_run_without_anything_held_out_still_draws_its_curves(tiny, tmp_path):
    run = tiny.train(tmp_path / "run", val="", val_fraction=0.0, max_steps=1)
    assert (run / "curves.png").exists() and not (run / "samples.jsonl").exists()


def test_the_next_stage_starts_from_the_last_one(tiny, finished, tmp_path):
    model = run_stage(
        tiny.settings(
            tmp_path / "run",
            init=str(finished / "model"),
            train="projector,language_model",
            max_steps=1,
        )
    )
    assert model == tmp_path / "run" / "model"
    load_model(model)


def test_what_a_killed_process_left_half_written_is_no_run(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".settings.toml.123.tmp").write_text("")
    assert (tiny.train(tmp_path / "run", init=str(tiny.model), max_steps=1) / "model").is_dir()


def test_the_settings_of_a_run_name_the_number_format_it_chose(tiny, tmp_path):
    run = tiny.train(tmp_path / "run", init=str(tiny.model), max_steps=1, dtype="auto")
    assert tomllib.loads((run / "settings.toml").read_text())["dtype"] in ("bfloat16", "float32")


@pytest.mark.parametrize(
    "dtype, device",
    [
        ("float32", "cpu"),
        ("bfloat16", "cpu"),
        pytest.param("bfloat16", "cuda", marks=pytest.mark.gpu),
    ],
)
def test_a_deterministic_run_is_resumed_as_one_and_gives_the_same_bits(
    any_algorithms, tiny, tmp_path, capsys, dtype, device
):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    settings = {
        "train": "projector,language_model,vision_encoder",
        "deterministic": True,
        "dtype": dtype,
        "device": device,
        "save_every": 2,
    }
    run = tiny.train(tmp_path / "run", **settings)
    assert torch.are_deterministic_algorithms_enabled()
    assert f"device {device}" in (said := capsys.readouterr().err) and ", deterministic" in said
    assert tomllib.loads((run / "settings.toml").read_text())["deterministic"] is True
    again = tiny.train(tmp_path / "again", **settings)
    assert contents(run / "model") == contents(again / "model")
    # Stopped after two steps, it goes on with the settings of the run.
    shutil.rmtree(again / "model")
    shutil.rmtree(again / "checkpoints" / "step_4")
    torch.use_deterministic_algorithms(False)
    run_stage(load_settings("stage1", ["--resume", "--out", str(again)]))
    assert torch.are_deterministic_algorithms_enabled()
    assert contents(run / "model") == contents(again / "model")
    with pytest.raises(NanoVLMError, match="--deterministic False .was True.*--allow-changes"):
        load_settings("stage1", ["--resume", "--out", str(again), "--no-deterministic"])


def test_a_second_run_in_the_same_folder_is_refused_and_changes_nothing(tiny, tmp_path):
    with pytest.raises(NanoVLMError, match="cannot be used"):  # a run of no steps, with settings
        (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        record = json.loads((tiny.data / "train.jsonl").read_text().splitlines()[0])
        record["image"] = str(tmp_path / "cut.png")
        (tmp_path / "bad.jsonl").write_text(json.dumps(record) + "\n")
        bad = str(tmp_path / "bad.jsonl")
        tiny.train(tmp_path / "run", init=str(tiny.model), data=bad, val="", val_fraction=0.0)
    process = hold(tmp_path / "run")
    before = contents(tmp_path / "run")
    for resume in (False, True):
        with pytest.raises(NanoVLMError, match="run: is being written by another process"):
            tiny.train(tmp_path / "run", init=str(tiny.model), resume=resume)
    assert contents(tmp_path / "run") == before
    process.kill()
    process.communicate()
    assert (tiny.train(tmp_path / "run", init=str(tiny.model), max_steps=1) / "model").is_dir()
    assert not (tmp_path / "run" / ".lock").exists()
