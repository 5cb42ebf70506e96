"""The README and docs/: commands run as they stand, both languages say the same, links lead on."""

import contextlib
import io
import json
import re
import runpy
import shlex
import sys
import tomllib
from functools import cache
from itertools import pairwise
from unittest import mock

import pytest

from nanovlm.data.preferences import parse_pair
from nanovlm.data.records import parse_record
from nanovlm.errors import see
from nanovlm.training.presets import load_settings
from tests.pages import (
    ASSETS,
    ENGLISH,
    PAGES,
    README,
    REPOSITORY,
    TEXTS,
    TWINS,
    anchors,
    code_blocks,
    code_spans,
    prose,
)

# Made by an earlier command, or the reader's own
MADE_BY_OTHERS = ("runs/", "data/", "weights/", "the-cauldron/", "$")
EXTRAS = ("", "-data", "-dev", "-hub", "-lessons", "-web")
REQUIREMENTS = tuple(f"requirements{extra}.txt" for extra in EXTRAS)
PLACEHOLDERS = {"DIR": "somewhere", "FILE": "somewhere.jsonl", "NAME": "mary"}
# Programs of others that the pages name, and what may follow each.
OTHER_PROGRAMS = {
    "conda": ("create", "activate"),
    "nvidia-smi": (),
    "source": (".venv/bin/activate",),
}
# The first column of the tables that translate the commands of other projects.
THEIRS = re.compile(r"^\| (?:theirs|原项目) \|.*\n\|---.*\n(?:\|.*\n)+", re.MULTILINE)
FIRST_CELL = re.compile(r"^\| (?:[^|\\]|\\.)*\|", re.MULTILINE)
PROGRAMS = (
    ("train_stage1.py",),
    ("infer.py",),
    ("-m", "nanovlm.evaluation"),
    ("-m", "nanovlm.bench"),
    ("-m", "nanovlm.memory"),
    ("-m", "nanovlm.report"),
    ("-m", "nanovlm.serve"),
    ("-m", "nanovlm.export"),
    ("-m", "data_tools.convert"),
    ("-m", "data_tools.check"),
    ("-m", "data_tools.mix"),
    ("data_tools/pack_tar.py",),
    ("data_tools/make_preferences.py",),
    ("-m", "data_tools.download"),
)
FLAGS_OF_OTHERS = ("--help", "--force-reinstall", "--shm-size", "--ipc=host", "--ipc")
# Words of earlier versions: flags, folders and names that are refused or gone.
OLD = re.compile(
    r"--(lr-)?(vision|text)(?![\w-])|--(text|vision)-(shape|layers|embedding)(?![\w-])"
    r"|--dtype (bf16|fp16|fp32)|projector,(text|vision)\b|lr_(text|vision)\b"
    r"|tiny-(text|vision)(?!-)|\b(eyes?|voices?|towers?|connectors?|vit\.py|decoder\.py|experts\.py|dpo\.py)\b"
    r"|\b(VisionTransformer|DecoderConfig|VisionConfig)\b|眼睛|视觉塔|视觉词元|连接层",
    re.IGNORECASE,
)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.* found in sys.modules after import:RuntimeWarning:runpy"
)  # tests import it


def commands() -> list[tuple[str, ...]]:
    """The words of each command of the English pages, without leading assignments; each once."""
    lines = []
    for page in [english for english, _ in TWINS] + [ASSETS]:
        for language, block in code_blocks(TEXTS[page]):
            lines += block.splitlines() if language == "bash" or page == ASSETS else []
        lines += [span for span in code_spans(ours(TEXTS[page])) if is_command(span)]
    found = []
    for command in (command for line in lines for command in line.split(" && ")):
        words = shlex.split(command)
        while words and re.match(r"[A-Z_]+=", words[0]):
            del words[0]
        found += [tuple(words)] if words else []
    return list(dict.fromkeys(found))


def ours(text: str) -> str:
    """`text` without the commands and flags of other projects that its tables translate."""
    return THEIRS.sub(lambda table: FIRST_CELL.sub("|", table[0]), text)


def is_command(span: str) -> bool:
    """Whether a code span is a whole command, which is tried as such."""
    return span.startswith(("python ", "torchrun "))


def check_pip(words: list[str]) -> None:
    """What follows `pip install`: our files of requirements, or PyTorch in the version they pin."""
    (torch,) = (
        line
        for line in (REPOSITORY / "requirements.txt").read_text().splitlines()
        if line.startswith("torch==")
    )
    following = iter(words)
    for word in following:
        if word == "-r":
            assert next(following) in REQUIREMENTS
        elif word in ("-i", "--index-url"):
            assert next(following).startswith("https://")
        else:
            assert word in ("--force-reinstall", torch)


@cache
def help_of(*program: str) -> str:
    """What `python PROGRAM --help` prints; run here, where importing torch is already paid for."""
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


def unknown_values(words: list[str], help_text: str) -> list[str]:
    """Values of flags that the help lists the choices of, and that are none of them."""
    return [
        f"{flag} {value}"
        for flag, value in pairwise(words)
        if (choices := re.search(rf"(?<!\S){re.escape(flag)} \{{([^}}]+)\}}", help_text))
        and value not in choices[1].split(",")
    ]


def flags_of_training(words: list[str]) -> list[str]:
    """The flags that `nanovlm.memory` and an estimate hand on to the settings of a run."""
    own, rest = iter(words), []
    for word in own:
        if word in ("--gpu", "--tokens", "--stage", "--estimate", "--records"):
            next(own)
        elif word not in ("--measure", "--forward"):
            rest.append(PLACEHOLDERS.get(word, word))
    return rest


def test_there_are_commands():
    assert len(commands()) > 40


@pytest.mark.parametrize("command", commands(), ids=lambda command: " ".join(command)[:60])
def test_a_command_can_be_run_as_it_stands(command):
    if command[0] == "torchrun":  # its own flags, then ours
        place = next(place for place, word in enumerate(command) if word.endswith(".py"))
        command = ("python", *command[place:])
    if command[:2] == ("jupyter", "lab"):
        assert all((REPOSITORY / folder).is_dir() for folder in command[2:])
        return
    if command[0] in OTHER_PROGRAMS:
        assert command[1:2] == () or command[1] in OTHER_PROGRAMS[command[0]]
        return
    assert command[0] == "python", "every other command is python's or torchrun's"
    if command[1] == "-c":
        compile(command[2], "README", "exec")
    elif command[1:3] == ("-m", "pip"):
        assert command[3] == "install" and command[4:]
        check_pip(list(command[4:]))
    elif command[1:] == ("-m", "venv", ".venv"):
        pass
    elif command[1:3] == ("-m", "pytest"):
        pytest_options = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"][
            "pytest"
        ]
        known = [marker.split(":")[0] for marker in pytest_options["ini_options"]["markers"]]
        rest = list(command[3:])
        if "-n" in rest:
            place = rest.index("-n")
            assert rest.pop(place + 1) == "auto" and rest.pop(place)
        rest = [word for word in rest if not word.startswith("-r")]
        rest = [word for word in rest if not (REPOSITORY / word).is_file()]
        if rest:
            assert rest[0] == "-m" and len(rest) == 2
            assert all(word in (*known, "or", "not") for word in rest[1].split())
    elif command[1].startswith("train_stage"):
        stage = command[1].removeprefix("train_").removesuffix(".py")
        arguments = [PLACEHOLDERS.get(word, word) for word in command[2:]]
        load_settings(stage, arguments)  # raises on anything unknown
        assert (REPOSITORY / command[1]).is_file()
    else:
        program = command[1:3] if command[1] == "-m" else command[1:2]
        rest = command[1 + len(program) :]
        known = help_of(*program)
        assert not unknown_values(rest, known)
        if program == ("-m", "nanovlm.memory") or "--estimate" in rest:
            known += help_of("train_stage1.py")
            load_settings("stage2", flags_of_training(rest))
        assert not unknown_flags(rest, known)
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


@pytest.mark.parametrize("page", PAGES)
def test_flags_named_in_the_text_exist(page):
    known = "".join(help_of(*program) for program in PROGRAMS)
    flags = [
        flag
        for span in code_spans(ours(TEXTS[page]))
        for flag in re.findall(r"(?<!\S)--[a-z0-9_-]+", span)
        if flag not in FLAGS_OF_OTHERS and not is_command(span)
    ]
    assert not unknown_flags(flags, known)
    assert flags or page not in README


@pytest.mark.parametrize("page", [*PAGES, ASSETS])
def test_the_words_of_earlier_versions_are_gone(page):
    assert not [match[0] for match in OLD.finditer(ours(TEXTS[page]))]


@pytest.mark.parametrize("page", [page for page in PAGES if THEIRS.search(TEXTS[page])])
def test_flags_in_place_of_another_projects_are_read_with_their_values(page):
    tables = "".join(table[0] for table in THEIRS.finditer(TEXTS[page]))
    flags = [span for span in code_spans(ours(tables)) if span.startswith("--")]
    assert len(flags) > 30
    for span in flags:
        words = shlex.split(span)
        if len(words) > 1:  # one flag alone is in the help, which another test looks at
            preset = "zero-qwen-vl" if "stage3" in words else "mary"
            load_settings("stage2", ["--preset", preset, *words])


def test_every_section_that_messages_link_to_is_there_in_both_languages():
    linked = {
        match[1]
        for path in [*(REPOSITORY / "nanovlm").rglob("*.py"), *REPOSITORY.glob("*.py")]
        for match in re.finditer(r"\bsee\(['\"]([^'\"]+)['\"]\)", path.read_text(encoding="utf-8"))
    }
    assert len(linked) >= 8
    for page in ("docs/en/troubleshooting.md", "docs/zh/troubleshooting.md"):
        assert linked <= anchors(TEXTS[page])
    assert see("nan").endswith("docs/en/troubleshooting.md#nan")


def test_every_page_has_its_twin():
    assert {path.name for path in (REPOSITORY / "docs" / "zh").iterdir()} == ENGLISH
    assert len(ENGLISH) >= 8


@pytest.mark.parametrize("english, chinese", TWINS)
def test_both_languages_have_the_same_structure(english, chinese):
    english, chinese = TEXTS[english], TEXTS[chinese]
    assert code_blocks(english) == code_blocks(chinese)
    for pattern in (r"^#+ ", r"^- ", r"^\d+\. ", r"^\|", r"^$", r"<!-- .* -->"):
        assert re.findall(pattern, english, re.MULTILINE) == re.findall(
            pattern, chinese, re.MULTILINE
        ), pattern


@pytest.mark.parametrize("english, chinese", TWINS)
def test_both_languages_give_the_same_figures(english, chinese):
    figures = r"\d+(?:[.,]\d+)+|\d{2,}"
    english, chinese = (set(re.findall(figures, prose(TEXTS[page]))) for page in (english, chinese))
    assert english == chinese


@pytest.mark.parametrize("english, chinese", TWINS)
def test_both_languages_name_the_same_code(english, chinese):
    english, chinese = (set(code_spans(TEXTS[page])) for page in (english, chinese))
    assert english == chinese


@pytest.mark.parametrize("english, chinese", TWINS)
def test_both_languages_link_to_the_same_pages(english, chinese):
    def targets(page: str) -> list[str]:
        found = re.findall(r"\]\(([^)#]+)", TEXTS[page])[2 if "docs" in page else 1 :]
        return [target.replace("/zh/", "/en/").replace(".zh-CN", "") for target in found]

    assert targets(english) == targets(chinese)  # after those to each other and to the README


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page):
    targets = [
        target for target in re.findall(r"\]\(([^)]+)\)", TEXTS[page]) if "://" not in target
    ]
    assert targets
    for target in targets:
        path, _, anchor = target.partition("#")
        there = (REPOSITORY / page).parent / path
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", [page for page in PAGES if page not in README])
def test_a_page_leads_to_its_twin_and_to_the_readme(page):
    twins = next(twins for twins in TWINS if page in twins)
    links = re.findall(r"\]\(([^)]+)\)", TEXTS[page].splitlines()[2])
    found = [(REPOSITORY / page).parent.joinpath(link).resolve() for link in links]
    other = twins[1 - twins.index(page)]
    assert found == [REPOSITORY / other, REPOSITORY / README[twins.index(page)]]


@pytest.mark.parametrize("page", [*PAGES, ASSETS])
def test_files_named_in_the_text_exist(page):
    names_of_ours = re.compile(
        r"(nanovlm|data_tools|tests|docs)/[\w./-]*|[\w-]+\.py|nanovlm(\.\w+)+"
    )
    for name in filter(names_of_ours.fullmatch, code_spans(ours(TEXTS[page]))):
        path = name if "/" in name or name.endswith(".py") else name.replace(".", "/")
        places = (path, f"{path}.py", f"nanovlm/training/{path}", f"nanovlm/model/{path}")
        assert any((REPOSITORY / place).exists() for place in places), name


@pytest.mark.parametrize("page", ["docs/en/design.md", "docs/zh/design.md"])
def test_the_layout_is_complete(page):
    package = REPOSITORY / "nanovlm"
    there = {f"nanovlm/{path.name}/" for path in package.iterdir() if any(path.glob("*"))}
    there -= {"nanovlm/__pycache__/"}
    there |= {f"nanovlm/{path.name}" for path in package.glob("*.py")} - {"nanovlm/__init__.py"}
    there |= {f"nanovlm/model/{path.name}" for path in (package / "model").glob("[!_]*.py")}
    assert not there - set(code_spans(TEXTS[page]))


@pytest.mark.parametrize("page", [page for page, _ in TWINS])
def test_the_records_shown_are_records(page, tmp_path):
    (tmp_path / "cat.jpg").touch()
    for language, block in code_blocks(TEXTS[page]):
        for line in block.splitlines() if language == "json" else []:
            entry = json.loads(line)
            parse = parse_pair if "chosen" in entry else parse_record
            assert parse(entry, page, tmp_path).images == (tmp_path / "cat.jpg",)


def test_records_are_shown():
    shown = {page: dict(code_blocks(TEXTS[page])).get("json", "") for page, _ in TWINS}
    assert len(shown["README.md"].splitlines()) == 1
    assert len(shown["docs/en/data.md"].splitlines()) == 3
    assert len(shown["docs/en/systems.md"].splitlines()) == 1


@pytest.mark.parametrize("page", PAGES)
def test_no_number_of_tests_is_pasted(page):
    assert not re.search(r"\d+ (passed|deselected|tests)|\d+ (个|项|条)测试", TEXTS[page])
