"""The two READMEs: they are short, their map of the files is true, and CI runs what they say."""

import re
import subprocess
import tomllib

import pytest
from packaging.requirements import Requirement
from PIL import Image, ImageChops

from data_tools.draw_architecture import draw_architecture
from nanovlm.training.presets import load_settings
from tests.pages import ENGLISH, README, REPOSITORY, TEXTS, prose

REQUIREMENTS = (
    "requirements.txt",
    "requirements-dev.txt",
    "requirements-hub.txt",
    "requirements-web.txt",
)


def test_a_reader_need_not_scroll_for_long():
    for name in README:
        assert len(TEXTS[name].splitlines()) <= 160
    english, chinese = (prose(TEXTS[name]) for name in README)
    assert len(re.findall(r"\S*\w\S*", english)) <= 1500
    assert len(re.findall(r"[\u4e00-\u9fff]", chinese)) <= 2500


@pytest.mark.parametrize("name", README)
def test_every_page_of_docs_is_listed(name):
    folder = "docs/en" if name == "README.md" else "docs/zh"
    listed = re.findall(rf"^- \[[^]]+\]\({folder}/([^)]+)\)", TEXTS[name], re.MULTILINE)
    assert sorted(listed) == sorted(ENGLISH)


@pytest.mark.parametrize("name", README)
def test_the_file_map_is_complete_and_true(name):
    rows = re.findall(r"^\| ((?:`[^`]+` ?)+)\|", TEXTS[name], re.MULTILINE)
    assert len(rows) <= 12
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
    there |= {path.name for path in REPOSITORY.glob("*.py")} | {"data_tools/", "tests/", "docs/"}
    assert there == named


def test_packages_are_pinned_and_within_the_ranges_of_pyproject():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    ranges = {
        "requirements.txt": project["dependencies"],
        "requirements-dev.txt": project["optional-dependencies"]["dev"],
        "requirements-hub.txt": project["optional-dependencies"]["hub"],
        "requirements-web.txt": project["optional-dependencies"]["web"],
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
    """Another font renderer may shade an edge differently; other sizes or words show."""
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
        assert differing < 100, f"{name}: run data_tools/draw_architecture.py --replace"
