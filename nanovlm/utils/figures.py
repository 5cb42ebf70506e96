"""matplotlib as every picture here is drawn: without a screen, written in one step, with a Chinese font if there is one."""

import logging
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.figure import Figure

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)

from nanovlm.utils.files import atomic_path

logging.getLogger("matplotlib.font_manager").setLevel(
    logging.ERROR
)  # a font without a normal weight will do
CHINESE_FONTS = (
    "pingfang",
    "hiragino sans gb",
    "msyh",
    "simhei",
    "notosanscjk",
    "notosanssc",
    "sourcehansans",
    "wqy",
    "droidsansfallback",
    "arial unicode",
)  # how the names of their files begin


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` to `path` as a PNG and let go of it."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


def chinese_fonts() -> list[str]:
    """The name of one font of the system that has Chinese characters, looked up afresh: matplotlib's own list of fonts is
    from when it first ran."""
    for path in sorted(font_manager.findSystemFonts()):
        if Path(path).name.lower().startswith(CHINESE_FONTS):
            font_manager.fontManager.addfont(path)
            return [font_manager.FontProperties(fname=path).get_name()]
    return []
