"""matplotlib for every picture of the package: without a screen, and with Chinese on any machine.

A character is drawn in the first of these fonts that has it: DejaVu Sans, which matplotlib brings
along; the font of `nanovlm/assets/fonts`, which holds GB 2312's first level; an installed Chinese
font, if there is one. What none of them has is drawn as a box, and `save_figure` says so.
"""

import itertools
import logging
import re
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib import font_manager
from matplotlib.figure import Figure

from nanovlm.errors import see
from nanovlm.utils.console import say
from nanovlm.utils.files import atomic_path

CHINESE_FONT = Path(__file__).parents[1] / "assets" / "fonts" / "NanovlmSansSC-Regular.otf"
# How the file names of fonts with Chinese characters begin.
INSTALLED = (
    "pingfang", "hiragino sans gb", "msyh", "simhei", "notosanscjk", "notosanssc",
    "sourcehansans", "wqy", "droidsansfallback", "arial unicode",
)  # fmt: skip
_boxes_said: set[str] = set()  # characters; a figure that is redrawn says it once


def save_figure(figure: Figure, path: Path, dpi: int = 110) -> None:
    """Write `figure` to `path` as a PNG and close it.

    Characters that no font here has are named on stderr.
    """
    with warnings.catch_warnings(record=True) as caught, atomic_path(path) as temporary:
        warnings.simplefilter("always")
        figure.savefig(temporary, format="png", dpi=dpi)
    plt.close(figure)
    boxes = set()
    for warning in caught:
        if missing := re.match(r"Glyph (\d+) .*missing from", str(warning.message)):
            boxes.add(chr(int(missing[1])))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    if boxes := sorted(boxes - _boxes_said):
        _boxes_said.update(boxes)
        say(f"{path}: drawn as boxes, for want of a font: {' '.join(boxes)}; {see('fonts')}")


def _add_font(path: str | Path) -> str:
    """Make a font file known to matplotlib; returns the name of its family."""
    font_manager.fontManager.addfont(path)
    return font_manager.FontProperties(fname=path).get_name()


def _installed_fonts() -> list[str]:
    """One installed font with Chinese characters, or none.

    The system is searched anew, because matplotlib's own list of fonts dates from its first run.
    """
    paths = sorted(font_manager.findSystemFonts())
    found = (path for path in paths if Path(path).name.lower().startswith(INSTALLED))
    return [_add_font(path) for path in itertools.islice(found, 1)]


plt.switch_backend("Agg")
# That a font has no bold weight is worth no warning.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
plt.rcParams["font.family"] = ["DejaVu Sans", _add_font(CHINESE_FONT), *_installed_fonts()]
