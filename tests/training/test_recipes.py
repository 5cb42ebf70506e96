"""What a run tells its user to type next, over the presets' stages and a user's own files."""

import dataclasses
from pathlib import Path

import pytest

import train_stage1
from nanovlm.training.presets import load_settings
from nanovlm.training.recipes import Recipe, next_commands
from nanovlm.training.settings import Settings, to_toml

ASK = 'python infer.py IMAGE "描述图片" --model'


def following(script: str, *arguments: str, **changes) -> list[str]:
    """The commands after a stage that ran with these arguments."""
    settings = dataclasses.replace(load_settings(script, list(arguments)), **changes)
    return next_commands(Recipe.of_command(script, list(arguments)), settings)


def test_the_default_goes_from_stage_1_to_stage_2_to_an_answer():
    assert following("stage1") == ["python train_stage2.py"]
    assert following("stage2")[0] == 'python infer.py IMAGE "描述图片"'


def test_before_the_toy_worlds_pairs_come_the_answers_they_are_made_of(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made, trained = following("stage2", "--preset", "mary", "--tiny")[1].split(" && ")
    assert made == "python data_tools/make_preferences.py --model runs/tiny-mary-stage2/model"
    assert trained == "python train_stage2.py --preset mary --tiny --stage dpo"
    (tmp_path / "data/scenes").mkdir(parents=True)
    (tmp_path / "data/scenes/pairs.jsonl").touch()
    assert following("stage2", "--preset", "mary", "--tiny")[1] == trained
    assert (
        following("stage2", "--preset", "mary")[1]
        == "python train_stage2.py --preset mary --stage dpo --data FILE.jsonl"
    )


def test_the_stages_of_a_preset_follow_each_other():
    toy = ["--preset", "zero-qwen-vl", "--tiny"]
    assert following("stage1", *toy, "--max-steps", "5") == [
        "python train_stage2.py --preset zero-qwen-vl --tiny"
    ]
    assert following("stage2", *toy) == [
        f"{ASK} runs/tiny-zero-qwen-vl-stage2/model",
        "python train_stage2.py --preset zero-qwen-vl --tiny --stage stage3",
    ]
    assert following("stage2", *toy, "--stage", "stage3") == [
        f"{ASK} runs/tiny-zero-qwen-vl-stage3/model"
    ]


def test_after_words_comes_stage_1_on_the_same_captions():
    photos = ["--preset", "dinov2-qwen2.5", "--stage", "words", "--data", "captions.jsonl"]
    (command,) = following("stage1", *photos)
    assert command == (
        "python train_stage1.py --preset dinov2-qwen2.5 --init runs/photos-words/model "
        "--data captions.jsonl"
    )
    words = ["--objective", "words", "--out", "runs/words"]
    assert following("stage1", *words) == ["python train_stage1.py --init runs/words/model"]
    assert following("stage1", "--preset", "mary", "--tiny", *words) == [
        "python train_stage1.py --preset mary --tiny --init runs/words/model"
    ]
    before = Recipe("stage1", "dinov2-qwen2.5").neighbour(-1)
    assert before and before.command == "train_stage1.py --preset dinov2-qwen2.5 --stage words"


def test_what_the_next_stage_cannot_know_is_asked_for():
    assert following("stage1", "--preset", "mary", "--data", "captions.jsonl") == [
        "python train_stage2.py --preset mary --data FILE.jsonl"
    ]
    assert following("stage1", "--data", "mine.jsonl", "--out", "my run") == [
        "python train_stage2.py --init 'my run/model' --data FILE.jsonl"
    ]
    assert following("stage2", "--preset", "svlm", "--data", "mine.jsonl") == [
        f"{ASK} runs/svlm-stage2/model"
    ]


def test_whoever_has_records_of_their_own_makes_no_pairs_of_the_toy_world(
    tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert following("stage2", "--data", "mine.jsonl", "--out", "runs/mine")[1] == (
        "python train_stage2.py --stage dpo --init runs/mine/model --data FILE.jsonl"
    )


def test_a_resumed_run_whose_recipe_is_not_said_gets_no_stage_of_another(tmp_path: Path):
    settings = Settings(out=str(tmp_path / "run"), data="mine.jsonl", lr=0.5)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.toml").write_text(to_toml(settings))
    assert following("stage2", "--resume", "--out", settings.out) == [f"{ASK} {settings.out}/model"]
    assert following("stage1", "--config", f"{settings.out}/settings.toml") == [
        f"python train_stage2.py --init {settings.out}/model --data FILE.jsonl"
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--lr", "1"], []),
        (["--preset", "mary", "--tiny", "--lr", "1"], ["--preset", "mary", "--tiny"]),
        (["--config", "a.toml", "--stage", "dpo"], ["--config", "a.toml", "--stage", "dpo"]),
    ],
)
def test_what_a_later_command_has_to_repeat(arguments: list[str], expected: list[str]):
    assert Recipe.of_command("stage2", arguments).flags == expected


def test_the_stage_before():
    assert (
        Recipe("stage3", "zero-qwen-vl").neighbour(-1).command
        == "train_stage2.py --preset zero-qwen-vl"
    )
    assert (
        Recipe("stage2", "mary", tiny=True).neighbour(-1).command
        == "train_stage1.py --preset mary --tiny"
    )
    assert Recipe("stage1").neighbour(-1) is None


def test_a_mistake_in_a_later_stage_is_found_before_this_one_trains(tmp_path: Path, tiny, call):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "[stage1]\n"
        + to_toml(tiny.settings(tmp_path / "run", max_steps=1))
        + "[stage2]\nlearning_rate = 1.0\n"
    )
    refused = call(train_stage1.main, "--config", recipe)
    assert (
        refused.returncode == 2
        and "learning_rate" in refused.stderr
        and not (tmp_path / "run").exists()
    )
    assert (
        f"error: train_stage2.py --config {recipe}, which comes next, would fail: "
        in refused.stderr
    )


def test_a_later_stage_may_leave_its_start_to_the_printed_command(tmp_path: Path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[stage1]\nout = "run"\n[dpo]\nobjective = "dpo"\ntrain = "projector,language_model"\n'
    )
    assert following("stage1", "--config", str(recipe)) == [
        f"python train_stage2.py --config {recipe} --stage dpo --init run/model --data FILE.jsonl"
    ]
