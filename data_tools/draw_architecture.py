"""Draw the picture at the top of the README, nanovlm/assets/architecture.png, and the toy scene it shows, scene.png.

    python data_tools/draw_architecture.py [--out nanovlm/assets]

Shapes, parameter counts and which part learns in which stage are read from the presets and configs, so that the picture
says what the code does. The same configs give the same bytes with the same matplotlib and pillow.
"""

import io
import itertools
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)
import torch  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle  # noqa: E402
from PIL import Image  # noqa: E402

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # the repository, so that a plain clone works

from data_tools.scenes_text import Question, questions  # noqa: E402
from data_tools.scenes_world import TRAIN_PAIRS, draw, random_scene  # noqa: E402
from nanovlm.hub.image_configs import parse_image_config
from nanovlm.hub.language_configs import parse_language_model_config
from nanovlm.hub.toy import ASSETS
from nanovlm.hub.vision_configs import parse_vision_encoder_config
from nanovlm.inputs.image_config import ImageConfig  # noqa: E402
from nanovlm.model.language_model import LanguageModel, LanguageModelConfig  # noqa: E402
from nanovlm.model.projector import ProjectorConfig, build_projector  # noqa: E402
from nanovlm.model.vision_encoder import VisionEncoder, VisionEncoderConfig  # noqa: E402
from nanovlm.training.presets import load_settings  # noqa: E402
from nanovlm.training.settings import Settings  # noqa: E402
from nanovlm.utils.console import run_command, say  # noqa: E402
from nanovlm.utils.files import read_json, write_atomically  # noqa: E402
from nanovlm.utils.parser import CommandParser

WIDTH, HEIGHT = 900, 640  # in the units of the drawing, which are pixels where the README shows it
INK, FAINT, LINE = "#1f2933", "#667380", "#9aa5b1"
VISUAL, SPLICE, WORD, ANSWER = "#b9a5e8", "#7d5fc7", "#e4e9ee", "#cfe8d2"
Colours = tuple[str, str]  # of an area and of its edge
FROZEN, ALWAYS, LATER = (
    ("#eef1f4", "#9aa5b1"),
    ("#fde6c8", "#d98a1f"),
    ("#d6e6fb", "#4a7fc1"),
)  # what learns when


@dataclass(frozen=True)
class Shapes:
    """The sizes of one preset's model."""

    name: str
    image: ImageConfig
    vision_encoder: VisionEncoderConfig
    projector: ProjectorConfig
    language_model: LanguageModelConfig

    @property
    def patches(self) -> int:
        return self.vision_encoder.num_patches(self.image.height, self.image.width)

    @property
    def tokens(self) -> int:
        with torch.device("meta"):
            return self._build_projector().num_tokens(self.patches)

    def lines(self) -> dict[str, tuple[str, ...]]:
        """What is said about each part."""
        with torch.device("meta"):
            eyes, projector, voice = (
                VisionEncoder(self.vision_encoder),
                self._build_projector(),
                LanguageModel(self.language_model),
            )
        side, width = self.vision_encoder.patch_size, self.language_model.hidden_size
        return {
            "image": (f"{self.image.width}×{self.image.height}", "pixels"),
            "patches": (f"{self.patches} patches", f"of {side}×{side} pixels"),
            "vision_encoder": (f"{self.vision_encoder.num_hidden_layers} layers, width {self.vision_encoder.hidden_size}", _parameters(eyes)),
            "projector": (f"{self.projector.kind}, {self.vision_encoder.hidden_size} → {width}", _parameters(projector)),
            "visual": (f"{self.tokens} tokens", f"of width {width}"),
            "language_model": (f"{self.language_model.num_hidden_layers} layers", f"width {width}", f"vocabulary {self.language_model.vocab_size:,}",
                     _parameters(voice)),
        }  # fmt: skip

    def _build_projector(self) -> torch.nn.Module:
        return build_projector(
            self.projector, self.vision_encoder.hidden_size, self.language_model.hidden_size
        )


def _parameters(module: torch.nn.Module) -> str:
    count = sum(parameter.numel() for parameter in module.parameters())
    return f"{count / 1e6:.{0 if count > 1e8 else 1 if count > 1e6 else 2}f} M parameters"


def presets() -> tuple[Shapes, Shapes]:
    """The tiny default as it ships, and the photo preset with the sizes published for its two parts."""
    eyes, voice = ASSETS / "tiny-vision-encoder", ASSETS / "tiny-language-model"
    tiny = Shapes("tiny default", parse_image_config(read_json(eyes / "preprocessor_config.json")),
                  parse_vision_encoder_config(read_json(eyes / "config.json")), _projector("tiny"),
                  parse_language_model_config(read_json(voice / "config.json")))  # fmt: skip
    dinov2_small = VisionEncoderConfig(
        hidden_size=384, intermediate_size=1536, num_attention_heads=6
    )
    photos = Shapes("DINOv2-S + Qwen2.5-0.5B", ImageConfig(), dinov2_small, _projector("dinov2-qwen2.5"),
                    LanguageModelConfig())  # whose defaults are Qwen2.5-0.5B's  # fmt: skip
    return tiny, photos


def _projector(preset: str) -> ProjectorConfig:
    settings = load_settings("stage1", ["--preset", preset])
    return ProjectorConfig(settings.projector, settings.grid, settings.scale)


class Drawing:
    """A page of WIDTH × HEIGHT units, x to the right and y downwards, and the few marks the picture is made of."""

    def __init__(self) -> None:
        self.figure = plt.figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=200, facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
        self.axes.axis("off")

    def text(self, x: float, y: float, text: str, size: float = 8, **options) -> None:
        self.axes.text(
            x, y, text, fontsize=size, **{"color": INK, "ha": "center", "va": "center", **options}
        )

    def file(self, x: float, y: float, name: str, **options) -> None:
        self.text(x, y, name, color=FAINT, family="monospace", **options)

    def frame(
        self, x: float, y: float, width: float, height: float, colours: Colours, corner: float = 8
    ) -> None:
        area, edge = colours
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=f"round,pad=0,rounding_size={corner}",
                                           facecolor=area, edgecolor=edge, linewidth=1.4))  # fmt: skip

    def token(self, x: float, y: float, side: float) -> None:
        self.axes.add_patch(Rectangle((x, y), side, side, facecolor=VISUAL))

    def chips(self, x: float, y: float, words: list[str], colour: str) -> float:
        """Words in a row from `x` on, each on its own ground; returns where the next one would stand."""
        for word in words:
            width = 14 + 6.1 * len(word)
            self.frame(x, y, width, 26, (colour, colour), corner=4)
            self.text(x + width / 2, y + 13, word)
            x += width + 6
        return x

    def arrow(self, *points: tuple[float, float], colour: str = LINE) -> None:
        """A line through `points` with a head at the last one."""
        if len(points) > 2:
            self.axes.plot(*zip(*points[:-1]), color=colour, linewidth=1.6, solid_capstyle="round")
        self.axes.add_patch(FancyArrowPatch(points[-2], points[-1], arrowstyle="-|>", mutation_scale=11, color=colour,
                                            linewidth=1.6, shrinkA=0, shrinkB=0))  # fmt: skip

    def picture(self, image: Image.Image, x: float, y: float, side: float) -> None:
        self.axes.imshow(
            image,
            extent=(x, x + side, y + side, y),
            interpolation="nearest",
            aspect="auto",
            zorder=2,
        )

    def png(self) -> bytes:
        buffer = io.BytesIO()
        self.figure.savefig(
            buffer, format="png", metadata={"Software": None}
        )  # no version, so that bytes repeat
        plt.close(self.figure)
        return buffer.getvalue()


COLUMNS = {
    "image": 165,
    "patches": 305,
    "vision_encoder": 465,
    "projector": 640,
    "visual": 810,
}  # middles of the first row
MIDDLE = 96  # its height


def draw_eyes(
    page: Drawing, scene: Image.Image, shapes: tuple[Shapes, Shapes], learns: dict[str, Colours]
) -> None:
    """The first row, from the image to its visual tokens, with the sizes below each part."""
    for name, title in (("image", "image"), ("patches", "patches"), ("visual", "visual tokens")):
        page.text(COLUMNS[name], 20, title, 9.5, weight="bold")
    page.picture(scene, COLUMNS["image"] - 52, MIDDLE - 52, 104)
    tiny = shapes[0]
    cell = tiny.vision_encoder.patch_size
    for x, y in _grid(scene.width // cell):
        patch = scene.crop((x * cell, y * cell, (x + 1) * cell, (y + 1) * cell))
        page.picture(patch, COLUMNS["patches"] - 57 + 14.4 * x, MIDDLE - 57 + 14.4 * y, 12.4)
    page.frame(COLUMNS["vision_encoder"] - 72, MIDDLE - 57, 144, 114, learns["vision_encoder"])
    page.text(
        COLUMNS["vision_encoder"],
        MIDDLE - 12,
        "Vision\nencoder",
        10.5,
        weight="bold",
        linespacing=1.3,
    )
    page.file(COLUMNS["vision_encoder"], MIDDLE + 24, "vision_encoder.py")
    page.frame(COLUMNS["projector"] - 62, MIDDLE - 57, 124, 114, learns["projector"])
    page.text(COLUMNS["projector"], MIDDLE - 8, "Projector", 10.5, weight="bold")
    page.file(COLUMNS["projector"], MIDDLE + 16, "projector.py")
    for x, y in _grid(math.isqrt(tiny.tokens)):
        page.token(COLUMNS["visual"] - 47 + 12 * x, MIDDLE - 47 + 12 * y, 9.5)
    for start, end in ((224, 243), (367, 388), (542, 573), (707, 756)):
        page.arrow((start, MIDDLE), (end, MIDDLE))
    for number, preset in enumerate(shapes):
        y = 184 + 46 * number
        page.axes.add_patch(Rectangle((14, y - 14), WIDTH - 28, 42, facecolor="#f5f7f9"))
        page.text(
            24,
            y + 7,
            preset.name.replace(" + ", " +\n"),
            ha="left",
            weight="bold",
            linespacing=1.35,
        )
        lines = preset.lines()
        for name, x in COLUMNS.items():
            for line, text in enumerate(lines[name]):
                page.text(x, y + 15 * line, text, color=FAINT if line else INK)


def draw_voice(
    page: Drawing, question: Question, shapes: tuple[Shapes, Shapes], learns: dict[str, Colours]
) -> None:
    """From the words of the prompt and the visual tokens down to the answer."""
    y, left, middle = 316, 113, 465
    page.file(24, y + 13, "chat.py\ntokenizer/", ha="left", linespacing=1.35)
    x = page.chips(left, y, ["<user>"], WORD)
    slot = x + 126
    page.axes.add_patch(
        Rectangle((x, y - 6), 252, 38, facecolor="none", edgecolor=SPLICE, linestyle=(0, (3, 2)))
    )
    for number in (*range(6), *range(7, 13)):
        page.token(x + 3 + 19 * number, y + 5, 16)
    page.text(x + 3 + 19 * 6 + 8, y + 12, "…", 10, color=SPLICE)
    page.chips(x + 258, y, [*_words(question.text), "</s>", "<assistant>"], WORD)
    page.arrow(
        (COLUMNS["visual"], 266),
        (COLUMNS["visual"], 284),
        (slot, 284),
        (slot, y - 8),
        colour=SPLICE,
    )
    page.text(
        slot + 12,
        297,
        "spliced in where the text holds placeholders: vlm.py",
        ha="left",
        color=SPLICE,
    )
    page.arrow((middle, y + 38), (middle, 384))
    page.text(
        middle + 12, 368, "token embeddings and visual tokens, one sequence", ha="left", color=FAINT
    )
    page.frame(left, 388, 2 * (middle - left), 100, learns["language_model"])
    page.text(middle, 408, "Language model", 10.5, weight="bold")
    page.file(middle, 428, "language_model.py")
    for number, preset in enumerate(shapes):
        page.text(
            middle,
            450 + 19 * number,
            f"{preset.name}: {', '.join(preset.lines()['language_model'])}",
        )
    page.arrow((middle, 492), (middle, 516))
    page.file(24, 533, "generate.py", ha="left")
    page.chips(middle - 90, 520, [*_words(question.answer), "</s>"], ANSWER)
    page.text(middle, 564, "inference: one token after another; training: loss on these tokens only",
              color=FAINT)  # fmt: skip


def draw_legend(page: Drawing) -> None:
    """What the colours of the boxes mean."""
    x, y = 150, 606
    legend = {"frozen in both stages": (FROZEN, 200), "trainable in stages 1 and 2": (ALWAYS, 255),
              "trainable in stage 2 only": (LATER, 0)}  # fmt: skip
    for text, (colours, width) in legend.items():
        page.frame(x, y - 8, 22, 16, colours, corner=4)
        page.text(x + 32, y, text, 8.5, ha="left")
        x += width


def when_it_learns(stages: list[Settings]) -> dict[str, Colours]:
    """The colours of each part, from what the two stages train."""
    colours = {(False, False): FROZEN, (True, True): ALWAYS, (False, True): LATER}
    return {part: colours[tuple(part in stage.trained_parts for stage in stages)]
            for part in ("vision_encoder", "projector", "language_model")}  # fmt: skip


def _grid(side: int) -> Iterator[tuple[int, int]]:
    return itertools.product(range(side), repeat=2)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def draw_architecture() -> tuple[bytes, bytes]:
    """The PNG files of the architecture and of the scene in it."""
    scene = random_scene(Random("picture/102"), TRAIN_PAIRS)
    question = next(
        asked for asked in questions(scene, Random(0), language="en") if asked.kind == "what"
    )
    image, shapes = draw(scene), presets()
    learns = when_it_learns([load_settings(stage, []) for stage in ("stage1", "stage2")])
    page = Drawing()
    draw_eyes(page, image, shapes, learns)
    draw_voice(page, question, shapes, learns)
    draw_legend(page)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return page.png(), buffer.getvalue()


def main() -> None:
    """Read the flag, draw, write."""
    parser = CommandParser(
        description="Draw the README's picture of the architecture, and the scene in it."
    )
    parser.add_argument(
        "--out", type=Path, default=ASSETS, help="folder for both pictures (default: the assets)"
    )
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in zip(("architecture.png", "scene.png"), draw_architecture()):
        write_atomically(folder / name, data)
        say(str(folder / name))


if __name__ == "__main__":
    run_command(main)
