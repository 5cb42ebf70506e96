"""The font that ships is what the script makes of its source."""

from pathlib import Path

import fontTools
import pytest
from fontTools.ttLib import TTFont
from matplotlib import font_manager

from data_tools import make_font
from data_tools.make_font import FONT, characters
from nanovlm.utils.figures import CHINESE_FONT

SOURCE = "NotoSansCJK-Regular.ttc"
MADE_WITH = "4.68.0"  # of fontTools; another one may write the same font in other bytes


def test_the_shipped_font_holds_the_scripts_characters_and_no_others():
    assert FONT == CHINESE_FONT
    assert set(TTFont(FONT).getBestCmap()) == set(map(ord, characters()))


def test_another_file_is_refused_and_nothing_is_written(tmp_path, call):
    source, out = tmp_path / "other.ttc", tmp_path / "out.otf"
    source.write_bytes(b"ttcf")
    ended = call(make_font.main, source, "--out", out)
    assert ended.returncode == 2 and not out.exists()
    assert ended.stderr.startswith(f"error: {source}: is not {SOURCE} of release Sans2.004")
    assert ended.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_script_makes_the_same_bytes_again(tmp_path, call):
    installed = [path for path in font_manager.findSystemFonts() if Path(path).name == SOURCE]
    if not installed:
        pytest.skip(f"{SOURCE} is not installed (Debian: fonts-noto-cjk)")
    if fontTools.version != MADE_WITH:
        pytest.skip(f"the font was made with fontTools {MADE_WITH}, here is {fontTools.version}")
    out = tmp_path / "again.otf"
    ended = call(make_font.main, installed[0], "--out", out)
    assert ended.returncode == 0, ended.stderr
    assert out.read_bytes() == FONT.read_bytes()
