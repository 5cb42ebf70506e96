"""The two READMEs: their commands can be run as they stand, they say the same, and what they point to exists."""

import contextlib
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
from packaging.requirements import Requirement
from PIL import Image, ImageChops

from data_tools.draw_architecture import draw_architecture
from nanovlm.data.records import parse_record
from nanovlm.training.settings import load_settings

REPOSITORY = Path(__file__).parents[1]
READMES = ("README.md", "README.zh-CN.md")
TEXTS = {name: (REPOSITORY / name).read_text(encoding="utf-8") for name in READMES}
REQUIREMENTS = ("requirements.txt", "requirements-dev.txt")
MADE_BY_OTHERS = ("runs/", "data/scenes/", "$")  # made by an earlier command, or the reader's own
pytestmark = pytest.mark.filterwarnings(
    "ignore:.* found in sys.modules after import:RuntimeWarning:runpy"
)  # tests import it
PLACEHOLDERS = {"DIR": "somewhere", "FILE": "somewhere.jsonl"}


def code_blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, ...]]:
    """The words of each command in the README's bash blocks, without leading assignments; each once."""
    found = []
    for language, block in code_blocks(TEXTS["README.md"]):
        if language != "bash":
            continue
        for line in block.splitlines():
            for command in re.split(r" && ", line):
                words = shlex.split(command)
                while words and re.match(r"[A-Z_]+=", words[0]):
                    del words[0]
                found += [tuple(words)] if words else []
    return list(dict.fromkeys(found))


@cache
def help_of(*program: str) -> str:
    """What `python PROGRAM --help` prints; run in this process, which has already paid for importing torch."""
    printed = io.StringIO()
    with (mock.patch("sys.argv", [program[-1], "--help"]), mock.patch("sys.path", [*sys.path]),
          contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended):  # fmt: skip
        if program[0] == "-m":
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(REPOSITORY / program[0]), run_name="__main__")
    assert ended.value.code == 0
    return printed.getvalue()


def unknown_flags(words: list[str], help_text: str) -> list[str]:
    return [
        flag
        for flag in words
        if flag.startswith("--") and not re.search(rf"(?<!\S){flag}(?![\w-])", help_text)
    ]


def test_there_are_commands():
    assert len(commands()) > 15


@pytest.mark.parametrize("command", commands(), ids=lambda command: " ".join(command)[:60])
def test_a_command_can_be_run_as_it_stands(command):
    if command[0] == "torchrun":  # its own flags, then ours
        command = (
            "python",
            *command[next(place for place, word in enumerate(command) if word.endswith(".py")) :],
        )
    assert command[0] == "python", "every command is python's or torchrun's"
    if command[1] == "-c":
        compile(command[2], "README", "exec")
    elif command[1:3] == ("-m", "pip"):
        assert (
            command[3:5] == ("install", "-r") and command[5] in REQUIREMENTS and len(command) == 6
        )
    elif command[1:3] == ("-m", "pytest"):
        markers = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["pytest"][
            "ini_options"
        ]["markers"]
        rest = [
            word
            for word in command[3:]
            if not (REPOSITORY / word).is_file() and not word.startswith("-r")
        ]
        known = [marker.split(":")[0] for marker in markers]
        assert (
            not rest
            or rest[0] == "-m"
            and all(word in (*known, "or", "not") for word in rest[1].split())
            and len(rest) == 2
        )
    elif command[1].startswith("train_stage"):
        stage = command[1].removeprefix("train_").removesuffix(".py")
        load_settings(
            stage, [PLACEHOLDERS.get(word, word) for word in command[2:]]
        )  # raises on anything unknown
        assert (REPOSITORY / command[1]).is_file()
    else:
        program = command[1:3] if command[1] == "-m" else command[1:2]
        rest = command[1 + len(program) :]
        flags_of_training = (
            help_of("train_stage1.py") if program == ("-m", "nanovlm.memory") else ""
        )
        assert not unknown_flags(rest, help_of(*program) + flags_of_training)
        for path in (
            word
            for word in rest
            if "/" in word and not word.startswith("--") and not word.startswith(MADE_BY_OTHERS)
        ):
            assert (REPOSITORY / path).exists(), path
        if "--control" in rest:
            assert rest[rest.index("--control") + 1] in ("blind", "shuffled")


@pytest.mark.parametrize("name", ["train_stage1.py", "train_stage2.py"])
def test_the_training_scripts_print_their_help(name):
    assert "--preset" in help_of(name)


def test_flags_named_in_the_text_exist():
    known = "".join(
        help_of(*program)
        for program in (
            ("train_stage1.py",),
            ("infer.py",),
            ("-m", "nanovlm.evaluation"),
            ("-m", "nanovlm.bench"),
            ("-m", "nanovlm.memory"),
            ("-m", "nanovlm.report"),
            ("data_tools/pack_tar.py",),
            ("data_tools/make_preferences.py",),
        )
    )
    for text in TEXTS.values():
        flags = [flag for flag in re.findall(r"`(--[a-z0-9_-]+)", text) if flag != "--help"]
        assert flags and not unknown_flags(flags, known)


def test_both_languages_have_the_same_structure():
    english, chinese = TEXTS.values()
    assert code_blocks(english) == code_blocks(chinese)
    for pattern in (r"^#+ ", r"^- ", r"^\|", r"^$", r"<!-- .* -->"):
        assert re.findall(pattern, english, re.MULTILINE) == re.findall(
            pattern, chinese, re.MULTILINE
        ), pattern


def test_both_languages_give_the_same_figures():
    prose = (re.sub(r"```.*?```", "", text, flags=re.DOTALL) for text in TEXTS.values())
    english, chinese = (set(re.findall(r"\d+(?:[.,]\d+)+|\d{2,}", text)) for text in prose)
    assert english == chinese


@pytest.mark.parametrize("name", READMES)
def test_a_reader_need_not_scroll_for_long(name):
    assert len(TEXTS[name].splitlines()) <= 420


@pytest.mark.parametrize("name", READMES)
def test_links_and_pictures_exist(name):
    targets = [
        target for target in re.findall(r"\]\(([^)]+)\)", TEXTS[name]) if "://" not in target
    ]
    assert targets and not [target for target in targets if not (REPOSITORY / target).exists()]


@pytest.mark.parametrize("name", READMES)
def test_the_file_map_is_complete_and_true(name):
    rows = re.findall(r"^\| ((?:`[^`]+` ?)+)\|", TEXTS[name], re.MULTILINE)
    named = {
        path
        for row in rows
        for path in re.findall(r"`([^`]+)`", row)
        if "/" in path or path.endswith(".py")
    }
    assert not [path for path in named if not (REPOSITORY / path).exists()]
    package = REPOSITORY / "nanovlm"
    there = {f"nanovlm/{path.name}" for path in package.glob("*.py") if path.name != "__init__.py"}
    there |= {
        f"nanovlm/{path.name}/"
        for path in package.iterdir()
        if path.is_dir() and path.name != "__pycache__"
    }
    there |= {path.name for path in REPOSITORY.glob("*.py")} | {"data_tools/", "tests/"}
    assert there == named


def test_the_records_shown_are_records(tmp_path):
    (tmp_path / "cat.jpg").touch()
    (shown,) = [block for language, block in code_blocks(TEXTS["README.md"]) if language == "json"]
    for line in shown.splitlines():
        record = parse_record(json.loads(line), "README.md", tmp_path)
        assert record.images == (tmp_path / "cat.jpg",)


def test_packages_are_pinned_and_within_the_ranges_of_pyproject():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    ranges = {
        "requirements.txt": project["dependencies"],
        "requirements-dev.txt": project["optional-dependencies"]["dev"],
    }
    for name in REQUIREMENTS:
        lines = (REPOSITORY / name).read_text().splitlines()
        pins = {
            line.split("==")[0]: line.split("==")[1] for line in lines if not line.startswith("-r ")
        }
        admitted = {
            requirement.name: requirement.specifier
            for requirement in map(Requirement, ranges[name])
        }
        assert pins.keys() == admitted.keys(), name
        assert not [
            package for package, version in pins.items() if version not in admitted[package]
        ]
    assert "-r requirements.txt" in (REPOSITORY / "requirements-dev.txt").read_text().splitlines()


def test_ci_runs_what_the_readme_says():
    script = REPOSITORY / ".ci" / "run"
    assert script.stat().st_mode & 0o111, "has to be executable"
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    for promised in (
        "python -m pip install -r requirements.txt",
        "python -m pip install -r requirements-dev.txt",
        "python -m pytest",
        "python train_stage1.py",
        "python train_stage2.py",
        'python infer.py nanovlm/assets/scene.png "描述图片"',
        "python -m nanovlm.evaluation",
    ):
        assert promised in text, promised
    (short,) = re.findall(r"^short=\((.*)\)$", text, re.MULTILINE)
    load_settings("stage1", short.split())


def test_the_picture_is_what_the_script_draws(tmp_path):
    """Other versions of its font renderer may shade an edge differently; other sizes or words show."""
    for name, data in zip(("architecture.png", "scene.png"), draw_architecture()):
        (tmp_path / name).write_bytes(data)
        drawn, shipped = (
            Image.open(folder / name).convert("L")
            for folder in (tmp_path, REPOSITORY / "nanovlm/assets")
        )
        assert drawn.size == shipped.size
        differing = sum(
            ImageChops.difference(drawn, shipped)
            .point(lambda value: 255 * (value > 64))
            .histogram()[255:]
        )
        assert differing < 100, f"{name}: run data_tools/draw_architecture.py"
