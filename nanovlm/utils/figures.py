"""matplotlib for the figures of a run: without a screen, and with a Chinese font if possible."""

import logging
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib import font_manager
from matplotlib.figure import Figure

from nanovlm.utils.files import atomic_path

plt.switch_backend("Agg")
# Not having a font's normal weight is worth no warning.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
# How the file names of fonts with Chinese characters begin.
CHINESE_FONTS = (
    "pingfang", "hiragino sans gb", "msyh", "simhei", "notosanscjk", "notosanssc",
    "sourcehansans", "wqy", "droidsansfallback", "arial unicode",
)  # fmt: skip


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` to `path` as a PNG and close it."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


def chinese_fonts() -> list[str]:
    """The name of one installed font with Chinese characters, or nothing.

    The system is searched anew, because matplotlib's own list of fonts dates from its first run.
    """
    for path in sorted(font_manager.findSystemFonts()):
        if Path(path).name.lower().startswith(CHINESE_FONTS):
            font_manager.fontManager.addfont(path)
            return [font_manager.FontProperties(fname=path).get_name()]
    return []
