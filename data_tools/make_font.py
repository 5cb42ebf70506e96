"""Make the font of the package's pictures, nanovlm/assets/fonts, from Noto Sans CJK SC.

    python data_tools/make_font.py NotoSansCJK-Regular.ttc --replace

The source is that of release Sans2.004, https://github.com/notofonts/noto-cjk; Debian and Ubuntu
have it in the package fonts-noto-cjk, as /usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc. It
is under the SIL Open Font License, and so is the subset, which has a name of its own. The same
source gives the same bytes with the same version of fontTools, which matplotlib brings along
(the file that ships was made with 4.68.0).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a plain clone

# First, because Ctrl-C is one line from here on, also during the slow imports below.
from nanovlm.utils.console import run_command, say

# isort: split
import hashlib
import io

from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTFont

from nanovlm.errors import NanoVLMError
from nanovlm.utils.files import read_bytes
from nanovlm.utils.outputs import add_replace_flag, check_new_file, write_new
from nanovlm.utils.parser import CommandParser

FONT = Path(__file__).parents[1] / "nanovlm" / "assets" / "fonts" / "NanovlmSansSC-Regular.otf"
SOURCE_SHA256 = "b76b0433203017ca80401b2ee0dd69350349871c4b19d504c34dbdd80541690a"
SOURCE_FAMILY = "Noto Sans CJK SC"  # one of the ten fonts in the source
FAMILY = "nanovlm Sans SC"
SYMBOLS, LEVEL_1 = range(0xA1, 0xAA), range(0xB0, 0xD8)  # rows of GB 2312, as its first byte
LATIN = [*range(0x20, 0x7F), *range(0xA0, 0x100)]
# What text has today where GB 2312's table means another dash or dot, and other common marks.
MARKS = "‐‑‒–—―‘’‚“”„†‡•…‰′″‹›€™−"
WORDS = "〇熵橄榄浏"  # characters of our documentation beyond GB 2312's first level
# Tables for vertical text, kerning and other forms of a character: pictures use none of them.
UNUSED_TABLES = ["BASE", "GPOS", "GSUB", "VORG", "vhea", "vmtx"]


def characters() -> set[str]:
    """What the font holds: GB 2312's symbols and first level, Latin letters, a few more."""
    return {*_gb2312(SYMBOLS), *_gb2312(LEVEL_1), *map(chr, LATIN), *MARKS, *WORDS}


def make_font(source: Path) -> bytes:
    """The subset of `source` as an OpenType font; raises if it is another file."""
    data = read_bytes(source)
    if (found := hashlib.sha256(data).hexdigest()) != SOURCE_SHA256:
        raise NanoVLMError(
            f"{source}: is not NotoSansCJK-Regular.ttc of release Sans2.004 (SHA-256 {found}, "
            f"expected {SOURCE_SHA256}); the head of data_tools/make_font.py says where it is"
        )
    font = next(font for font in _fonts(data) if font["name"].getDebugName(1) == SOURCE_FAMILY)
    options = Options(
        layout_features=[],
        bidi_closure=False,
        hinting=False,  # matplotlib hints by itself
        notdef_outline=True,
        name_IDs=[0, 5, 13, 14],  # copyright, version, licence and its address
    )
    options.drop_tables += UNUSED_TABLES
    subsetter = Subsetter(options)
    subsetter.populate(text="".join(characters()))
    subsetter.subset(font)
    _rename(font)
    buffer = io.BytesIO()
    font.save(buffer)
    return buffer.getvalue()


def _gb2312(rows: range) -> list[str]:
    """The characters of GB 2312 whose first byte is in `rows`; unused places give none."""
    pairs = (bytes((row, column)) for row in rows for column in range(0xA1, 0xFF))
    return [text for pair in pairs if (text := pair.decode("gb2312", errors="ignore"))]


def _fonts(data: bytes):
    """The fonts of a collection; the time of its making stays in them."""
    for number in range(int.from_bytes(data[8:12], "big")):
        yield TTFont(io.BytesIO(data), fontNumber=number, recalcTimestamp=False)


def _rename(font: TTFont) -> None:
    """Give the font and its outlines the name FAMILY, and say what it was made of."""
    postscript = f"{FAMILY.replace(' ', '')}-Regular"
    names = {
        1: FAMILY,
        2: "Regular",
        3: f"{font['name'].getDebugName(5)};{postscript}",
        4: FAMILY,
        6: postscript,
        10: f"A subset of {SOURCE_FAMILY}, made by nanovlm's data_tools/make_font.py.",
    }
    for number, text in names.items():
        font["name"].setName(text, number, 3, 1, 0x409)  # Windows, Unicode, English
    outlines = font["CFF "].cff
    outlines.fontNames = [postscript]
    top = outlines.topDictIndex[0]
    top.FullName, top.FamilyName = FAMILY, FAMILY
    for number, part in enumerate(top.FDArray):
        part.FontName = f"{postscript}-{number}"


def main() -> None:
    """Read the flags, make, write."""
    parser = CommandParser(description="Make the Chinese font of the package's pictures.")
    parser.add_argument("source", type=Path, help="NotoSansCJK-Regular.ttc, release Sans2.004")
    parser.add_argument("--out", type=Path, default=FONT, help="default: the one that ships")
    add_replace_flag(parser)
    arguments = parser.parse_args()
    check_new_file(arguments.out, "--out", [arguments.source], replace=arguments.replace)
    data = make_font(arguments.source)
    write_new(arguments.out, data, replace=arguments.replace)
    say(f"{arguments.out}: {len(characters()):,} characters, {len(data):,} bytes")


if __name__ == "__main__":
    run_command(main)
