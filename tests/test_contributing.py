"""What contributors go by: CONTRIBUTING in two languages, the changelog, checks and templates."""

import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

import nanovlm
from nanovlm.training.presets import load_settings
from nanovlm.training.settings import Settings

REPOSITORY = Path(__file__).parents[1]
GUIDES = ("CONTRIBUTING.md", "CONTRIBUTING.zh-CN.md")
TEXTS = {name: (REPOSITORY / name).read_text(encoding="utf-8") for name in GUIDES}
CHANGELOG = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
PINS = dict(
    line.split("==")
    for line in (REPOSITORY / "requirements-dev.txt").read_text().splitlines()
    if "==" in line
)
CI = (REPOSITORY / ".ci/run").read_text(encoding="utf-8")
NOT_TRIED = {  # commands of programs that the tests do without
    "source .venv/bin/activate",
    "pre-commit install",
    "git tag -a v0.1.0 -m v0.1.0",
    "git push origin v0.1.0",
}
NOT_OURS = ("NAME", "config.json", "settings.toml", "metrics.jsonl", ".venv")


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    return [line for block in code_blocks(TEXTS[GUIDES[0]]) for line in block.splitlines()]


def quoted(text: str) -> list[str]:
    """What stands between backticks in a line of prose."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


def test_both_guides_have_the_same_structure_commands_and_names():
    english, chinese = TEXTS.values()
    assert code_blocks(english) == code_blocks(chinese)
    for pattern in (r"^#+ ", r"^\d+\. ", r"^\|", r"^$"):
        assert len(re.findall(pattern, english, re.MULTILINE)) == len(
            re.findall(pattern, chinese, re.MULTILINE)
        ), pattern
    assert set(quoted(english)) == set(quoted(chinese))


@pytest.mark.parametrize("name", GUIDES)
def test_paths_and_links_of_a_guide_exist(name):
    paths = [
        text
        for text in quoted(TEXTS[name])
        if re.fullmatch(r"[\w./-]+", text)
        and ("/" in text or re.search(r"\.(py|md|toml|txt|yaml)$", text))
        and not any(word in text for word in NOT_OURS)
    ]
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXTS[name]) if "://" not in link]
    assert len(paths) > 20 and len(links) > 3
    assert not [path for path in paths + links if not (REPOSITORY / path).exists()]


def test_names_of_code_in_a_guide_exist():
    """Classes and constants, such as `ProjectorConfig` and `PROJECTORS`."""
    names = {
        text
        for text in quoted(TEXTS[GUIDES[0]])
        if re.fullmatch(r"[A-Z]+(_[A-Z]+)*|[A-Z]\w+[a-z]", text)
    }
    source = "\n".join(
        path.read_text(encoding="utf-8") for path in (REPOSITORY / "nanovlm").rglob("*.py")
    )
    assert {"PROJECTORS", "ProjectorConfig", "Settings", "LANGUAGE_MODELS"} <= names
    assert not [
        name
        for name in names
        if not re.search(rf"^(class {name}\b|{name}\b.*=)", source, re.MULTILINE)
    ]


def test_commands_that_are_not_tried_are_still_named():
    assert set(commands()) >= NOT_TRIED


@pytest.mark.parametrize("command", sorted(set(commands()) - NOT_TRIED))
def test_a_command_of_the_guides_is_valid(command):
    program, *words = shlex.split(command)
    if program == "bash":
        (script,) = words
        subprocess.run(["bash", "-n", REPOSITORY / script], check=True)
    elif program in ("ruff", "pyright"):
        assert program in PINS
        if program == "ruff":  # --help parses the rest, but runs nothing
            subprocess.run([sys.executable, "-m", "ruff", *words, "--help"], check=True)
    else:
        assert program == "python"
        if words[0].startswith("train_stage"):
            load_settings(words[0].removeprefix("train_").removesuffix(".py"), words[1:])
        elif words[:2] == ["-m", "pytest"]:
            check_pytest(words[2:])
        elif words[:3] == ["-m", "pip", "install"]:
            assert "-r" not in words or (REPOSITORY / words[words.index("-r") + 1]).is_file()
        else:
            assert words[0] == "-m"
            assert words[1] in ("venv", "build") or find_spec(words[1])


def check_pytest(words: list[str]) -> None:
    markers = [line.split(":")[0] for line in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]]
    if words[0] == "-n":
        assert words[1:] == ["auto"] and "pytest-xdist" in PINS
    elif words[0] == "-m":
        assert words[1] in markers and len(words) == 2
    else:
        assert all((REPOSITORY / word).is_file() for word in words)


def test_the_new_flags_of_the_changelog_exist_and_the_old_ones_are_gone():
    rows = re.findall(r"^\| `(--[^`]+)` \| `(--[^`]+)` \|$", CHANGELOG, re.MULTILINE)
    assert len(rows) == 12
    names = {field.name for field in fields(Settings)}
    for old, new in rows:
        (old_flag, *old_value), (new_flag, *new_value) = old.split(), new.split()
        assert new_flag.removeprefix("--").replace("-", "_") in names
        if old_flag == new_flag:  # it is the value that has another name
            assert old_value != new_value
            load_settings("stage1", [new_flag, *new_value])
        else:
            assert old_flag.removeprefix("--").replace("-", "_") not in names


def test_the_new_names_of_the_changelog_exist():
    table = CHANGELOG.split("| names in Python")[1]
    rows = re.findall(r"^\| (`.*) \| (`.*) \|$", table, re.MULTILINE)
    for name in re.findall(r"`([^`]+)`", " ".join(new for _, new in rows)):
        if name.startswith("assets/"):
            assert (REPOSITORY / "nanovlm" / name).is_dir()
        elif re.fullmatch(r"\w+", name):
            assert hasattr(nanovlm, name), name
    for name in re.findall(r"`(\w+)`", " ".join(old for old, _ in rows)):
        assert not hasattr(nanovlm, name), name


def test_the_changelog_knows_the_version():
    """Before the first release all is unreleased; afterwards pyproject's version has a section."""
    versions = re.findall(r"^## \[([^]]+)\]", CHANGELOG, re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert len(versions) == 1 or versions[1] == PYPROJECT["project"]["version"]


def test_ci_checks_what_the_pull_request_template_asks_for():
    template = (REPOSITORY / ".github/PULL_REQUEST_TEMPLATE.md").read_text(encoding="utf-8")
    for check in ("python -m pytest -n auto", "ruff check .", "ruff format --check .", "pyright"):
        assert f"run {check}\n" in CI and f"`{check}`" in template, check


def test_the_hooks_run_the_pinned_ruff():
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (revision,) = [repo["rev"] for repo in hooks["repos"] if "ruff-pre-commit" in repo["repo"]]
    assert revision == f"v{PINS['ruff']}"


def test_the_workflow_runs_ci_and_every_python_that_is_supported():
    text = (REPOSITORY / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert text.startswith("# Unproven until it has run")
    whole, tests = workflow["jobs"]["whole"], workflow["jobs"]["tests"]
    assert whole["steps"][-1]["run"] == "bash .ci/run"
    assert tests["steps"][-1]["run"] == "python -m pytest -n auto"
    matrix = tests["strategy"]["matrix"]
    assert matrix["python"] == ["3.11", "3.12", "3.13", "3.14"]
    supported = SpecifierSet(PYPROJECT["project"]["requires-python"])
    assert all(version in supported for version in matrix["python"]) and "3.10" not in supported
    systems = {*matrix["os"], *(extra["os"] for extra in matrix["include"])}
    assert systems == {"ubuntu-latest", "macos-latest", "windows-latest"}
    assert workflow["permissions"] == {"contents": "read"}


@pytest.mark.parametrize("form", ["bug_report", "question", "model_support"])
def test_an_issue_form_is_complete_and_bilingual(form):
    path = REPOSITORY / f".github/ISSUE_TEMPLATE/{form}.yml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    titles = [content["name"], content["description"]]
    titles += [part["attributes"]["label"] for part in content["body"]]
    assert all(
        re.search(r"[A-Za-z]+.* / .*[一-鿿]", title) for title in titles if title != "config.json"
    )
    identifiers = [part["id"] for part in content["body"]]
    assert len(set(identifiers)) == len(identifiers)
    assert any(part.get("validations", {}).get("required") for part in content["body"])


def test_the_type_checker_covers_what_users_run():
    included = PYPROJECT["tool"]["pyright"]["include"]
    assert {"nanovlm", "infer.py", "train_stage1.py", "train_stage2.py"} <= set(included)
    assert all((REPOSITORY / path).exists() for path in included)


def test_frozen_defaults_named_for_the_linter_exist():
    for name in PYPROJECT["tool"]["ruff"]["lint"]["flake8-bugbear"]["extend-immutable-calls"]:
        module, _, cls = name.rpartition(".")
        assert getattr(import_module(module), cls).__dataclass_params__.frozen
