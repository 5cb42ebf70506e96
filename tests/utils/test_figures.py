"""The font that ships holds GB 2312's first level, and pictures are drawn with it."""

import itertools
import tomllib
import unicodedata
import warnings
from pathlib import Path
from random import Random

import pytest
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import Image

from data_tools.scenes_text import questions
from data_tools.scenes_world import TRAIN_PAIRS, random_scene
from nanovlm.errors import see
from nanovlm.training.monitor.samples import draw_answers
from nanovlm.utils import figures
from nanovlm.utils.figures import CHINESE_FONT, plt, save_figure

REPOSITORY = Path(__file__).parents[2]
FONT = FT2Font(str(CHINESE_FONT))
SHIPPED = ["DejaVu Sans", FONT.family_name]  # with matplotlib, with this package


def holds(character: str, font: FT2Font = FONT) -> bool:
    return font.get_char_index(ord(character)) > 0


@pytest.fixture
def shipped_fonts_only():
    """As on a machine without a Chinese font."""
    with plt.rc_context({"font.family": SHIPPED}):
        yield


def test_the_font_holds_the_first_level_of_gb2312():
    characters = [chr(code) for code in range(0x4E00, 0xA000)]
    codes = {character: character.encode("gb2312", errors="ignore") for character in characters}
    first_level = [each for each in characters if b"\xb0\xa1" <= codes[each] <= b"\xd7\xf9"]
    assert len(first_level) == 3755
    assert not [character for character in first_level if not holds(character)]


def test_the_font_holds_punctuation_latin_and_digits():
    ascii_characters = map(chr, range(0x20, 0x7F))
    wide = map(chr, range(0xFF01, 0xFF5F))
    marks = "、。〈〉《》「」『』【】〔〕“”‘’—…·￥×÷±→←↑↓①⑩"
    assert not [each for each in (*ascii_characters, *wide, *marks) if not holds(each)]


def test_the_shipped_fonts_hold_what_the_documents_presets_and_pictures_say():
    files = [
        *REPOSITORY.glob("README*.md"),
        *(REPOSITORY / "docs").rglob("*.md"),
        *(REPOSITORY / "data_tools").glob("*.py"),
        *(REPOSITORY / "nanovlm").rglob("*.py"),
        *(REPOSITORY / "nanovlm" / "presets").glob("*.toml"),
    ]
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    for index, language in itertools.product(range(300), ("zh", "en")):
        scene = random_scene(Random(f"font/{index}"), TRAIN_PAIRS)
        for question in questions(scene, Random(index), language=language):
            text += question.text + question.answer
    dejavu = FT2Font(font_manager.findfont("DejaVu Sans"))
    for character in set(text):
        if character.isprintable():
            is_wide = unicodedata.east_asian_width(character) in "WF"
            assert holds(character) or (holds(character, dejavu) and not is_wide), character


def test_the_font_is_small_has_its_licence_and_a_name_of_its_own():
    assert CHINESE_FONT.stat().st_size < 1.3e6
    licence = (CHINESE_FONT.parent / "OFL.txt").read_text(encoding="utf-8")
    assert licence.startswith("Copyright 2014-2021 Adobe")
    assert "SIL OPEN FONT LICENSE Version 1.1" in licence
    assert "Noto" not in FONT.family_name and "Source" not in FONT.family_name


def test_the_wheel_takes_the_font_and_its_licence_along():
    pyproject = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    package = REPOSITORY / "nanovlm"
    patterns = pyproject["tool"]["setuptools"]["package-data"]["nanovlm"]
    taken = {path for pattern in patterns for path in package.glob(pattern)}
    assert {CHINESE_FONT, CHINESE_FONT.parent / "OFL.txt"} <= taken
    assert "nanovlm/assets/fonts/OFL.txt" in pyproject["project"]["license-files"]


def test_every_picture_looks_for_characters_in_both_fonts_before_any_installed_one():
    assert plt.rcParams["font.family"][:2] == SHIPPED


def test_a_picture_with_chinese_is_drawn_without_a_missing_character(
    tmp_path, shipped_fonts_only, monkeypatch, capsys
):
    """Also where matplotlib's warning is an error, so that `save_figure` cannot hide one."""
    answer = "图中有三个物体，从左到右是：小的绿色圆形、大的黄色菱形。"
    line = {"prompt": "描述图片", "answer": answer, "reference": "“熵”·64×64——…"}
    images = {"a": Image.new("RGB", (8, 8), "red")}

    def save_strictly(figure, path, dpi):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            figure.savefig(path)

    draw_answers(tmp_path / "drawn.png", images, {"第 1 步": {"a": line}})
    monkeypatch.setattr("nanovlm.training.monitor.samples.save_figure", save_strictly)
    draw_answers(tmp_path / "drawn.png", images, {"第 1 步": {"a": line}})
    assert capsys.readouterr().err == ""
    with pytest.raises(UserWarning, match="missing from"):
        draw_answers(tmp_path / "drawn.png", images, {"龘": {"a": line}})


def test_characters_that_no_font_has_are_said_once(
    tmp_path, shipped_fonts_only, monkeypatch, capsys
):
    monkeypatch.setattr(figures, "_boxes_said", set())
    said = []
    for text in ("图 龘𠀀", "龘", "龘齉"):
        figure = plt.figure()
        figure.text(0, 0.5, text)
        save_figure(figure, tmp_path / "drawn.png")
        said.append(capsys.readouterr().err)
    drawn = f"{tmp_path / 'drawn.png'}: drawn as boxes, for want of a font"
    assert said[0] == f"{drawn}: 龘 𠀀; {see('fonts')}\n"
    assert said[1] == ""
    assert said[2].endswith(f": 齉; {see('fonts')}\n")


def test_other_warnings_of_a_picture_are_passed_on(tmp_path):
    figure = plt.figure()
    monkey = figure.savefig

    def savefig(*arguments, **options):
        warnings.warn("something else", UserWarning, stacklevel=1)
        monkey(*arguments, **options)

    figure.savefig = savefig
    with pytest.warns(UserWarning, match="something else"):
        save_figure(figure, tmp_path / "drawn.png")
