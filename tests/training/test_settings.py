"""Where a setting's value comes from, and what is refused."""

import dataclasses
import math
import random
import re

import pytest

from nanovlm.errors import NanoVLMError
from nanovlm.hub.toy import ASSETS
from nanovlm.training.presets import load_settings, preset_names, stage_names
from nanovlm.training.settings import GROUPS, Settings, to_toml
from nanovlm.utils.parser import flag as spelled


def refusal(*arguments: str) -> str:
    with pytest.raises(NanoVLMError) as caught:
        load_settings("stage1", list(arguments))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_flags_the_tiny_preset_and_its_assets():
    settings = load_settings("stage1", [])
    assert (
        settings.data == "data/scenes/train.jsonl"
        and settings.train == "projector"
        and not settings.vision_norm
    )
    assert settings.vision_encoder == str(ASSETS / "tiny-vision-encoder")
    assert load_settings("stage2", []).init == "runs/stage1/model"


def test_flags_come_before_the_preset_and_the_preset_before_the_defaults():
    preset, changed = (
        load_settings("stage1", []),
        load_settings("stage1", ["--batch-size", "3", "--vision-norm"]),
    )
    assert (changed.batch_size, changed.vision_norm) == (3, True)
    assert dataclasses.replace(changed, batch_size=preset.batch_size, vision_norm=False) == preset
    assert preset.batch_size != Settings.batch_size and preset.clip == Settings.clip


def test_what_was_chosen_for_another_learning_rate_or_data_falls_away():
    preset = load_settings("stage2", [])
    assert preset.lr_language_model and preset.lr_projector and preset.val
    changed = load_settings("stage2", ["--lr", "0.5", "--data", "mine.jsonl"])
    assert (
        changed.lr,
        changed.lr_language_model,
        changed.lr_projector,
        changed.val,
        changed.images,
    ) == (0.5, 0, 0, "", "")
    assert [
        changed.peak_lr(part) for part in ("projector", "language_model", "vision_encoder")
    ] == [0.5] * 3
    kept = load_settings(
        "stage2",
        ["--lr", "0.5", "--lr-language-model", "0.25", "--val", "v.jsonl", "--data", "mine.jsonl"],
    )
    assert (kept.peak_lr("language_model"), kept.peak_lr("projector"), kept.val) == (
        0.25,
        0.5,
        "v.jsonl",
    )


def test_resolved_settings_come_back_from_their_file(tmp_path):
    settings = Settings(
        data='a "quoted" \\ 图.jsonl',
        lr=1e-5,
        epochs=3,
        train="language_model,vision_encoder",
        cache_features=True,
        seed=2**62,
    )
    path = tmp_path / "settings.toml"
    path.write_text(to_toml(settings), encoding="utf-8")
    assert (
        load_settings("stage1", ["--config", str(path)])
        == load_settings("stage2", ["--config", str(path)])
        == settings
    )
    assert load_settings("stage1", ["--config", str(path), "--seed", "1"]) == dataclasses.replace(
        settings, seed=1
    )


def test_any_text_comes_back_from_the_file_or_is_refused_before_it_is_written(tmp_path):
    draw, path = random.Random(0), tmp_path / "settings.toml"
    letters = [*map(chr, range(0x100)), "\u2028", "\ufeff", "\uffff", "😀", "图", '"""', "'" * 3]
    letters += ["{assets}", "\\u0041", "~", "~/", ",", "\r\n", "#", "\ud800", "\udfff"]
    refused = 0
    for _ in range(300):
        system, data = ("".join(draw.choices(letters, k=draw.randrange(9))) for _ in range(2))
        try:
            settings = Settings(system=system, data=data, out=data)
        except NanoVLMError as error:
            assert re.search("[\ud800-\udfff]", system + data) or "\0" in data
            assert str(error).isprintable()
            refused += 1
            continue
        path.write_bytes(to_toml(settings).encode())
        assert load_settings("stage1", ["--config", str(path)]) == settings
    assert 0 < refused < 150


def test_a_home_folder_and_a_byte_order_mark(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    flags = ("--data=~/a.jsonl, ~/b.jsonl", "--out=~/runs/a", "--images", "a~", "--system", "~")
    settings = load_settings("stage1", list(flags))
    assert settings.data == "/home/me/a.jsonl, /home/me/b.jsonl"
    assert (settings.out, settings.images, settings.system) == ("/home/me/runs/a", "a~", "~")
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xef\xbb\xbf" + b"data = '~/c.jsonl'\r\nimages = '{assets}'\r\n")
    settings = load_settings("stage1", ["--config", str(path)])
    assert (settings.data, settings.images) == ("/home/me/c.jsonl", str(ASSETS))
    assert "is a folder; name a file, such as" in refusal("--config", str(tmp_path))


def test_a_file_of_settings_that_was_cut_off_is_not_resumed_from(tmp_path):
    written = to_toml(Settings(out=str(tmp_path))).splitlines(keepends=True)
    (tmp_path / "settings.toml").write_text("".join(written[:40]))
    again = ("--resume", "--out", str(tmp_path))
    assert "settings.toml: lacks " in refusal(*again) and "was it cut off?" in refusal(*again)
    assert load_settings("stage1", [*again, "--allow-changes"]).resume


@pytest.mark.parametrize("workers", ["auto", 0, 3])
def test_workers_are_auto_or_a_number_in_flags_and_files(tmp_path, workers):
    assert Settings().workers == "auto"
    assert load_settings("stage1", ["--workers", str(workers)]).workers == workers
    path = tmp_path / "settings.toml"
    path.write_text(to_toml(Settings(workers=workers)))
    assert load_settings("stage1", ["--config", str(path)]).workers == workers
    for wrong in ("2.5", "true", '"3"'):
        path.write_text(f"workers = {wrong}\n")
        assert "workers is" in refusal("--config", str(path))


@pytest.mark.parametrize(
    ("flags", "compile"), [([], "auto"), (["--compile"], True), (["--no-compile"], False)]
)
def test_compile_is_auto_on_or_off_in_flags_and_files(tmp_path, flags, compile):
    assert load_settings("stage1", flags).compile == compile
    path = tmp_path / "settings.toml"
    path.write_text(to_toml(Settings(compile=compile, out=str(tmp_path))))
    assert load_settings("stage1", ["--config", str(path)]).compile == compile
    for wrong in ("1.5", '"on"'):
        path.write_text(f"compile = {wrong}\n")
        assert "compile is" in refusal("--config", str(path))


def test_a_run_goes_on_with_other_compilation(tmp_path):
    """Runs of version 0.1 say false where they did not compile."""
    for before in ("false", "true", '"auto"'):
        written = to_toml(Settings(out=str(tmp_path)))
        written = written.replace('compile = "auto"', f"compile = {before}")
        (tmp_path / "settings.toml").write_text(written)
        for flag, after in (("--compile", True), ("--no-compile", False)):
            settings = load_settings("stage1", ["--resume", "--out", str(tmp_path), flag])
            assert settings.compile is after


def test_a_resumed_run_has_its_own_settings(tmp_path):
    (tmp_path / "settings.toml").write_text(to_toml(Settings(batch_size=7, out=str(tmp_path))))
    settings = load_settings("stage1", ["--resume", "--out", str(tmp_path)])
    assert settings.batch_size == 7 and settings.resume
    assert "there is no run to continue" in refusal("--resume", "--out", str(tmp_path / "other"))


def test_a_resumed_run_refuses_what_would_change_its_result(tmp_path):
    (tmp_path / "settings.toml").write_text(
        to_toml(Settings(batch_size=7, lr=0.5, out=str(tmp_path)))
    )
    again = ("--resume", "--out", str(tmp_path))
    printed = refusal(*again, "--clip", "8", "--lr", "0.25", "--workers", "3", "--keep", "9")
    assert (
        "--lr 0.25 (was 0.5), --clip 8.0 (was 1.0); leave" in printed
        and "workers" not in printed
        and "keep" not in printed
    )
    same = load_settings(
        "stage1", [*again, "--batch-size", "7", "--workers", "3", "--keep", "9", "--val-every", "5"]
    )
    assert (same.batch_size, same.workers, same.keep, same.val_every) == (7, 3, 9, 5)
    changed = load_settings("stage1", [*again, "--lr", "0.25", "--allow-changes"])
    assert (changed.batch_size, changed.lr) == (7, 0.25)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--bogus 1", "unrecognized arguments: --bogus"),
        ("--batch 3", "unrecognized"),
        ("stray", "unrecognized arguments: stray"),
        ("--batch-size x", "invalid int value: 'x'"),
        ("--lr", "expected one argument"),
        ("--preset nope", "presets are basic-vlm, basic-vlm-24gb"),
        ("--config nope.toml", "nope.toml: cannot be read"),
        ("--system \udcff", "--system is '\\udcff', which is no UTF-8 text"),
        ("--preset tiny --config a", "not allowed with"),
        ("--lr -1", "--lr is -1.0"),
        ("--lr nan", "--lr is nan"),
        ("--epochs inf", "--epochs is inf"),
        ("--log-every 0", "--log-every"),
        ("--workers -1", "--workers is -1"),
        ("--workers many", "--workers is 'many'; it has to be auto"),
        ("--val-fraction 1", "below 1"),
        ("--beta2 1", "below 1"),
        ("--warmup 2", "between 0 and 1"),
        ("--grid 0", "--grid is 0"),
        ("--scale -1", "--scale is -1"),
        ("--seed 9223372036854775808", "--seed"),
        ("--device tpu", "take one of auto, cpu"),
        ("--dtype int8", "take one of auto, bfloat16"),
        ("--train eyes", "--train names eyes"),
        ("--train ,", "no part"),
    ],
)
def test_what_is_refused(flags, expected):
    assert expected in refusal(*flags.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[stage1]\nbatchsize = 3\n", "unknown key 'batchsize'; did you mean 'batch_size'?"),
        ("[stage1\n", "is not valid TOML"),
        ("[stage1]\nlr = 'fast'\n", "lr is 'fast', expected a number"),
        ("batch_size = true\n", "batch_size is True, expected a whole number"),
        ("batch_size = 0\n", "--batch-size is 0"),
        ("lr = " + "[" * 3000 + "]" * 3000, "is not valid TOML (nested too deep)"),
        ("lr = " + "9" * 5000, "is not valid TOML (Exceeds the limit (4300 digits)"),
        ("lr.a.b = 1\n", "lr is a table; give it a single value"),
        ("[stage1]\nlr = [1, 2]\n", "lr is a list; give it a single value"),
        ("stage1 = 3\n", "stage1 is no table; write the line [stage1]"),
        ("[[stage1]]\nlr = 1\n", "stage1 is no table; write the line [stage1]"),
        ("lr = 1\n[stage1]\n", "lr stands outside of the stages; move it below [stage1]"),
        ("[stage2]\nlr = 1\n", "has no stage 'stage1'; its stages are stage2"),
        ('base = "marry"\n', "base is 'marry', which is no preset; take one of basic-vlm"),
        ('base = "../presets/mary"\n', "base is '../presets/mary', which is no preset"),
        ("base = 3\n[stage1]\nlr = 1\n", "base is 3, which is no preset"),
        ('base = "mary"\nlr = 1\n', "lr stands outside of the stages; move it below [stage1]"),
        ('base = "mary"\nstage1 = 3\n', "stage1 is no table; write the line [stage1]"),
        ("", "holds no settings; was it cut off?"),
        ("lr: 1e-3\nbatch_size: 8\n", "is YAML; settings are read from TOML"),
        ('{"lr": 0.001}', "is JSON; settings are read from TOML"),
        ("<!DOCTYPE html><html>", "is an HTML page: the server sent it in place of the file"),
        ('data = "a\\u0000b"\n', "--data is 'a\\x00b'; no path has a NUL in it"),
        (b"\xff", "is not UTF-8 text"),
    ],
)
def test_what_is_refused_in_a_file(tmp_path, text, expected):
    path = tmp_path / "mine.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert expected in refusal("--config", str(path))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--dtype bf16", "--dtype bf16 is now --dtype bfloat16"),
        ("--dtype fp16", "--dtype fp16 is now --dtype float16"),
        ("--dtype fp32", "--dtype fp32 is now --dtype float32"),
        ("--train text", "--train text is now --train language_model"),
        ("--train projector,vision", "--train vision is now --train vision_encoder"),
        ("--vision DIR", "--vision is now --vision-encoder"),
        ("--text DIR", "--text is now --language-model"),
        ("--text-shape svlm", "--text-shape is now --language-model-shape"),
        ("--text-layers 2", "--text-layers is now --language-model-layers"),
        ("--text-embedding", "--text-embedding is now --language-model-embedding"),
        ("--vision-layers 2", "--vision-layers is now --vision-encoder-layers"),
        ("--lr-text 1e-4", "--lr-text is now --lr-language-model"),
        ("--lr-vision=1e-4", "--lr-vision is now --lr-vision-encoder"),
    ],
)
def test_an_old_flag_or_value_is_refused_with_its_new_name(flags, expected):
    assert refusal(*flags.split()) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[stage1]\ntext = 'DIR'\n", "[stage1]: key 'text' is now 'language_model'; rename it"),
        ("[stage1]\nlr_vision = 1e-4\n", "key 'lr_vision' is now 'lr_vision_encoder'; rename it"),
        ("[stage1]\ntrain = 'projector,text'\n", "--train text is now --train language_model"),
        ("[stage1]\ndtype = 'bf16'\n", "--dtype bf16 is now --dtype bfloat16"),
    ],
)
def test_an_old_key_or_value_in_a_file_is_refused_with_its_new_name(tmp_path, text, expected):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    assert expected in refusal("--config", str(path))


def test_a_run_of_an_old_version_is_not_resumed(tmp_path):
    old = to_toml(Settings(out=str(tmp_path))).replace("language_model_layers", "text_layers")
    (tmp_path / "settings.toml").write_text(old)
    assert "key 'text_layers' is now 'language_model_layers'; rename it" in refusal(
        "--resume", "--out", str(tmp_path)
    )


def test_settings_are_all_groups_and_every_one_has_its_help():
    grouped = [field for group in GROUPS.values() for field in dataclasses.fields(group)]
    names = [field.name for field in grouped]
    assert len(set(names)) == len(names)
    assert names == [field.name for field in dataclasses.fields(Settings)]
    assert all(field.metadata["help"] for field in grouped)


def test_tiny_changes_what_a_toy_needs_and_nothing_of_the_recipe():
    whole, toy = (
        load_settings("stage2", ["--preset", "basic-vlm", *flags]) for flags in ([], ["--tiny"])
    )
    assert (toy.train, toy.lora_targets, toy.objective) == (
        whole.train,
        whole.lora_targets,
        whole.objective,
    )
    assert (
        (whole.lora_rank, toy.lora_rank) == (128, 8)
        and toy.lr_language_model == 0
        and toy.data == "data/scenes/train.jsonl"
    )
    assert (whole.out, toy.out) == ("runs/basic-vlm-stage2", "runs/tiny-basic-vlm-stage2")
    assert toy.init == load_settings("stage1", ["--preset", "basic-vlm", "--tiny"]).out + "/model"
    assert (
        load_settings(
            "stage2", ["--preset", "basic-vlm", "--tiny", "--lr", "1e-5", "--out", "x"]
        ).lr
        == 1e-5
    )
    assert "name one with --preset" in refusal("--tiny")


def test_a_later_stage_of_a_preset():
    assert (
        load_settings("stage2", ["--preset", "zero-qwen-vl", "--stage", "stage3"]).init
        == "runs/zero-qwen-vl-stage2/model"
    )
    with pytest.raises(
        NanoVLMError, match="no stage 'stage4'; its stages are stage1, stage2, stage3"
    ):
        load_settings("stage2", ["--preset", "zero-qwen-vl", "--stage", "stage4"])


def test_a_file_changes_a_few_settings_of_a_preset_that_it_names_as_its_base(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('base = "mary"\n[stage2]\nbatch_size = 1\n[more]\nlr = 1e-6\n')
    flags = ["--config", str(path)]
    assert load_settings("stage1", flags) == load_settings("stage1", ["--preset", "mary"])
    assert load_settings("stage2", flags) == dataclasses.replace(
        load_settings("stage2", ["--preset", "mary"]), batch_size=1
    )
    assert stage_names(flags) == ["stage1", "stage2", "dpo", "more"]
    assert load_settings("stage2", [*flags, "--stage", "more"]) == Settings(lr=1e-6)


def test_a_learning_rate_in_place_of_the_bases_resets_what_was_chosen_for_that(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('base = "dinov2-qwen2.5"\n[stage2]\nlr = 1e-6\n')
    settings = load_settings("stage2", ["--config", str(path)])
    assert [settings.peak_lr(part) for part in settings.trained_parts] == [1e-6, 1e-6]


@pytest.mark.parametrize("preset", [name for name in preset_names() if name.endswith("gb")])
def test_a_preset_for_a_card_trains_the_same_model_as_its_base(preset):
    """It may change how much is held at once, and how: the same records make a step."""
    base = preset.rsplit("-", 1)[0]
    assert stage_names(["--preset", preset]) == stage_names(["--preset", base])
    for stage in stage_names(["--preset", base]):
        ours, theirs = (
            load_settings("stage2", ["--preset", name, "--stage", stage]) for name in (preset, base)
        )
        changed = {name for name in vars(ours) if getattr(ours, name) != getattr(theirs, name)}
        assert changed <= {
            "max_length", "batch_size", "accumulate", "checkpointing", "optimizer",
            "stochastic_rounding", "quantize", "lora_rank", "lr_language_model",
        }  # fmt: skip
        assert ours.batch_size * ours.accumulate == theirs.batch_size * theirs.accumulate


def test_every_number_of_the_settings_is_finite_and_bounded():
    settings = Settings()
    names = [
        field.name
        for field in dataclasses.fields(settings)
        if type(getattr(settings, field.name)) in (int, float)
    ]
    assert len(names) > 30
    for name in names:
        for value in (math.nan, math.inf, -math.inf, -2000, 2**63, 10**400, 1e308, 1e-320):
            with pytest.raises(NanoVLMError, match=f"^{spelled(name)} is .*; it has to be "):
                dataclasses.replace(settings, **{name: value})


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e308", "1e-320"])
def test_numbers_of_flags_are_finite_and_bounded(value):
    assert "--lr is" in refusal(f"--lr={value}")


@pytest.mark.parametrize("flags", [[], ["--tiny"]])
def test_words_are_a_stage_before_stage_1(flags):
    words = load_settings("stage1", ["--preset", "dinov2-qwen2.5", "--stage", "words", *flags])
    first = load_settings("stage1", ["--preset", "dinov2-qwen2.5", *flags])
    assert (words.objective, first.objective) == ("words", "sft")
    # The model that it leaves is the one that stage 1 would have made.
    same = ("vision_encoder", "language_model", "projector", "grid", "vision_norm", "vision_layer")
    assert [getattr(words, name) for name in same] == [getattr(first, name) for name in same]
    assert stage_names(["--preset", "dinov2-qwen2.5", *flags])[:2] == ["words", "stage1"]
