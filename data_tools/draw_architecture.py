"""Draw the architecture of the README, nanovlm/assets/architecture.png, and its scene, scene.png.

    python data_tools/draw_architecture.py --replace  # or --out FOLDER

Sizes, parameter counts and the stages in which a part is trainable are read from the presets and
configs, so that the drawing says what the code does. The same configs give the same bytes with the
same versions of matplotlib and Pillow.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a plain clone

# First, because Ctrl-C is one line from here on, also during the slow imports below.
from nanovlm.utils.console import run_command, say

# isort: split
import io
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import torch
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

from data_tools.scenes_text import Question, questions
from data_tools.scenes_world import TRAIN_PAIRS, draw, random_scene
from nanovlm.hub.image_configs import parse_image_config
from nanovlm.hub.language_configs import parse_language_model_config
from nanovlm.hub.toy import ASSETS
from nanovlm.hub.vision_configs import parse_vision_encoder_config
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.model.language_model import LanguageModel, LanguageModelConfig
from nanovlm.model.projector import ProjectorConfig, build_projector
from nanovlm.model.vision_encoder import VisionEncoder, VisionEncoderConfig
from nanovlm.training.presets import load_settings
from nanovlm.utils.figures import plt
from nanovlm.utils.files import read_json
from nanovlm.utils.outputs import add_replace_flag, check_new_file, write_new
from nanovlm.utils.parser import CommandParser

WIDTH, HEIGHT = 900, 604  # units of the drawing: pixels at the README's width
INK, FAINT, LINE, BAND = "#1f2933", "#667380", "#9aa5b1", "#f5f7f9"
WORD, VISUAL, ANSWER = "#e4e9ee", "#b9a5e8", "#cfe8d2"
# The colours of each part, of its area and of its edge; the lessons use the same.
PARTS = {
    "vision_encoder": ("#e9e2f8", "#7d5fc7"),
    "projector": ("#fde6c8", "#d98a1f"),
    "language_model": ("#d6e6fb", "#4a7fc1"),
}
TRAINABLE = {  # in stage 1, in stage 2
    (False, False): "frozen",
    (True, True): "trainable in stages 1 and 2",
    (False, True): "trainable in stage 2",
    (True, False): "trainable in stage 1",
}


@dataclass(frozen=True)
class Preset:
    """The configs of one preset's parts."""

    name: str
    image: ImageConfig
    vision_encoder: VisionEncoderConfig
    projector: ProjectorConfig
    language_model: LanguageModelConfig

    @property
    def num_patches(self) -> int:
        return self.vision_encoder.num_patches(self.image.height, self.image.width)

    @property
    def num_tokens(self) -> int:
        """Visual tokens of an image."""
        return self._build_projector().num_tokens(self.num_patches)

    def captions(self) -> dict[str, tuple[str, str]]:
        """Two lines about each column."""
        side, vision_width = self.vision_encoder.patch_size, self.vision_encoder.hidden_size
        width = self.language_model.hidden_size
        with torch.device("meta"):
            vision_encoder = VisionEncoder(self.vision_encoder)
        return {
            "image": (f"{self.image.width}×{self.image.height}", "pixels"),
            "patches": (f"{self.num_patches} patches", f"of {side}×{side} pixels"),
            "vision_encoder": (
                f"{self.vision_encoder.num_hidden_layers} layers, width {vision_width}",
                _parameters(vision_encoder),
            ),
            "projector": (
                f"{self.projector.kind}, {vision_width} → {width}",
                _parameters(self._build_projector()),
            ),
            "visual_tokens": (f"{self.num_tokens} tokens", f"of width {width}"),
        }

    def language_model_caption(self) -> str:
        """One line about the language model."""
        config = self.language_model
        with torch.device("meta"):
            parameters = _parameters(LanguageModel(config))
        return (
            f"{self.name}: {config.num_hidden_layers} layers, width {config.hidden_size}, "
            f"vocabulary {config.vocab_size:,}, {parameters}"
        )

    def _build_projector(self):
        with torch.device("meta"):
            return build_projector(
                self.projector, self.vision_encoder.hidden_size, self.language_model.hidden_size
            )


def _parameters(module: torch.nn.Module) -> str:
    count = sum(parameter.numel() for parameter in module.parameters())
    digits = 0 if count > 1e8 else 1 if count > 1e6 else 2
    return f"{count / 1e6:.{digits}f} M parameters"


def presets() -> tuple[Preset, Preset]:
    """The tiny default as it ships, and the photo preset at the sizes published for its parts."""
    vision_folder, language_folder = ASSETS / "tiny-vision-encoder", ASSETS / "tiny-language-model"
    tiny = Preset(
        "tiny default",
        parse_image_config(read_json(vision_folder / "preprocessor_config.json")),
        parse_vision_encoder_config(read_json(vision_folder / "config.json")),
        _projector_config("tiny"),
        parse_language_model_config(read_json(language_folder / "config.json")),
    )
    dinov2_small = VisionEncoderConfig(
        hidden_size=384, intermediate_size=1536, num_attention_heads=6
    )
    photos = Preset(
        "DINOv2-S + Qwen2.5-0.5B",
        ImageConfig(),
        dinov2_small,
        _projector_config("dinov2-qwen2.5"),
        LanguageModelConfig(),  # its defaults are Qwen2.5-0.5B's
    )
    return tiny, photos


def _projector_config(preset: str) -> ProjectorConfig:
    settings = load_settings("stage1", ["--preset", preset])
    return ProjectorConfig(settings.projector, settings.grid, settings.scale)


def trainable_parts() -> dict[str, str]:
    """The stages in which each part is trainable, in words."""
    stages = [load_settings(stage, []).trained_parts for stage in ("stage1", "stage2")]
    return {part: TRAINABLE[part in stages[0], part in stages[1]] for part in PARTS}


class Drawing:
    """A page of WIDTH × HEIGHT units, x to the right and y downwards, and its shapes."""

    def __init__(self) -> None:
        self.figure = plt.figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=200, facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
        self.axes.axis("off")

    def text(self, x: float, y: float, text: str, **options) -> None:
        style = {"fontsize": 8, "color": INK, "ha": "center", "va": "center", **options}
        self.axes.text(x, y, text, **style)

    def file(self, x: float, y: float, name: str, **options) -> None:
        self.text(x, y, name, color=FAINT, family="monospace", fontsize=7.2, **options)

    def frame(self, x: float, y: float, size: tuple[float, float], area: str, edge: str) -> None:
        style = f"round,pad=0,rounding_size={8 if size[1] > 30 else 4}"
        self.axes.add_patch(
            FancyBboxPatch(
                (x, y), *size, boxstyle=style, facecolor=area, edgecolor=edge, linewidth=1.4
            )
        )

    def part(self, x: float, y: float, part: str, size: tuple[float, float]) -> None:
        """The box of a part around (x, y), with its name and its file."""
        width, height = size
        self.frame(x - width / 2, y - height / 2, size, *PARTS[part])
        name = part.replace("_", " ").capitalize()
        top = y - height / 2
        self.text(x, top + 28, name, fontsize=10.5, weight="bold")
        self.file(x, top + 51, f"model/{part}.py")

    def square(self, x: float, y: float, side: float, colour: str = VISUAL) -> None:
        self.axes.add_patch(Rectangle((x, y), side, side, facecolor=colour))

    def tokens(self, x: float, y: float, words: list[str], colour: str) -> float:
        """Tokens of text in a row that starts at `x`; returns where the next would start."""
        for word in words:
            width = 14 + 6.1 * len(word)
            self.frame(x, y, (width, 26), colour, colour)
            self.text(x + width / 2, y + 13, word)
            x += width + 6
        return x

    def arrow(
        self, start: tuple[float, float], *points: tuple[float, float], colour: str = LINE
    ) -> None:
        """A line from `start` through `points` with a head at the last one."""
        *corners, end = start, *points
        if len(corners) > 1:
            self.axes.plot(*zip(*corners), color=colour, linewidth=1.6, solid_capstyle="round")
        style = {"arrowstyle": "-|>", "mutation_scale": 11, "shrinkA": 0, "shrinkB": 0}
        arrow = FancyArrowPatch(corners[-1], end, color=colour, linewidth=1.6, **style)
        self.axes.add_patch(arrow)

    def image(self, image: Image.Image, x: float, y: float, side: float) -> None:
        extent = (x, x + side, y + side, y)
        self.axes.imshow(image, extent=extent, interpolation="nearest", aspect="auto", zorder=2)

    def png(self) -> bytes:
        buffer = io.BytesIO()
        # Without the version of matplotlib, so that the bytes repeat.
        self.figure.savefig(buffer, format="png", metadata={"Software": None})
        plt.close(self.figure)
        return buffer.getvalue()


# Centres of the columns of the first row, and its height.
COLUMNS = {
    "image": 158,
    "patches": 291,
    "vision_encoder": 455,
    "projector": 642,
    "visual_tokens": 817,
}
ROW = 96


def draw_image_path(
    page: Drawing, scene: Image.Image, both: tuple[Preset, Preset], trainable: dict[str, str]
) -> None:
    """The first row, from the image to its visual tokens, with the sizes below each part."""
    image, patches, vision_encoder, projector, visual_tokens = COLUMNS.values()
    for x, title in ((image, "Image"), (patches, "Patches"), (visual_tokens, "Visual tokens")):
        page.text(x, 20, title, fontsize=9.5, weight="bold")
    page.image(scene, image - 52, ROW - 52, 104)
    tiny = both[0]
    cell = tiny.vision_encoder.patch_size
    for x, y in _grid(scene.width // cell):
        patch = scene.crop((x * cell, y * cell, (x + 1) * cell, (y + 1) * cell))
        page.image(patch, patches - 57 + 14.4 * x, ROW - 57 + 14.4 * y, 12.4)
    page.part(vision_encoder, ROW, "vision_encoder", (156, 114))
    page.part(projector, ROW, "projector", (144, 114))
    for x, part in ((vision_encoder, "vision_encoder"), (projector, "projector")):
        when = trainable[part].replace(" in ", " in\n")
        page.text(x, ROW + 29, when, weight="bold", linespacing=1.35)
    for x, y in _grid(math.isqrt(tiny.num_tokens)):
        page.square(visual_tokens - 47 + 12 * x, ROW - 47 + 12 * y, 9.5)
    for start, end in ((214, 231), (353, 371), (537, 565), (718, 765)):
        page.arrow((start, ROW), (end, ROW))
    for number, preset in enumerate(both):
        y = 184 + 46 * number
        page.axes.add_patch(Rectangle((14, y - 14), WIDTH - 28, 42, facecolor=BAND))
        name = preset.name.replace(" + ", " +\n")
        page.text(24, y + 7, name, ha="left", weight="bold", linespacing=1.35)
        for column, (first, second) in preset.captions().items():
            page.text(COLUMNS[column], y, first)
            page.text(COLUMNS[column], y + 15, second, color=FAINT)


def draw_text_path(
    page: Drawing, question: Question, both: tuple[Preset, Preset], trainable: dict[str, str]
) -> None:
    """From the words of the prompt and the visual tokens down to the answer."""
    y, left, middle = 316, 118, 465
    purple = PARTS["vision_encoder"][1]
    page.file(24, y + 13, "inputs/chat.py\ntokenizer/", ha="left", linespacing=1.35)
    x = page.tokens(left, y, ["<user>"], WORD)
    slots = Rectangle(
        (x, y - 6), 252, 38, facecolor="none", edgecolor=purple, linestyle=(0, (3, 2))
    )
    page.axes.add_patch(slots)
    for number in (*range(6), *range(7, 13)):
        page.square(x + 3 + 19 * number, y + 5, 16)
    page.text(x + 3 + 19 * 6 + 8, y + 12, "…", fontsize=10, color=purple)
    page.tokens(x + 258, y, [*_words(question.text), "</s>", "<assistant>"], WORD)
    splice, from_projector = x + 126, COLUMNS["visual_tokens"]
    corners = (from_projector, 284), (splice, 284), (splice, y - 8)
    page.arrow((from_projector, 266), *corners, colour=purple)
    page.text(splice + 12, 297, "spliced in at the placeholders:", ha="left", color=purple)
    page.file(splice + 182, 297, "model/vlm.py", ha="left")
    page.arrow((middle, y + 38), (middle, 384))
    caption = "token embeddings and visual tokens, one sequence"
    page.text(middle + 12, 368, caption, ha="left", color=FAINT)
    page.part(middle, 451, "language_model", (2 * (middle - left), 126))
    for number, preset in enumerate(both):
        page.text(middle, 460 + 18 * number, preset.language_model_caption())
    page.text(middle, 500, trainable["language_model"], weight="bold")
    page.arrow((middle, 518), (middle, 542))
    page.file(24, 559, "generate.py", ha="left")
    page.tokens(middle - 90, 546, [*_words(question.answer), "</s>"], ANSWER)
    caption = "inference: one token after another; training: loss on these tokens only"
    page.text(middle, 588, caption, color=FAINT)


def _grid(side: int) -> Iterator[tuple[int, int]]:
    return itertools.product(range(side), range(side))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def draw_architecture() -> tuple[bytes, bytes]:
    """The PNG files of the architecture and of the scene in it."""
    scene = random_scene(Random("picture/102"), TRAIN_PAIRS)
    asked = questions(scene, Random(0), language="en")
    question = next(question for question in asked if question.kind == "what")
    image, both, trainable = draw(scene), presets(), trainable_parts()
    page = Drawing()
    draw_image_path(page, image, both, trainable)
    draw_text_path(page, question, both, trainable)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return page.png(), buffer.getvalue()


def main() -> None:
    """Read the flag, draw, write."""
    parser = CommandParser(
        description="Draw the architecture as the README shows it, and the scene in it."
    )
    parser.add_argument(
        "--out", type=Path, default=ASSETS, help="folder for both PNG files (default: the assets)"
    )
    add_replace_flag(parser)
    arguments = parser.parse_args()
    paths = [arguments.out / name for name in ("architecture.png", "scene.png")]
    for path in paths:
        check_new_file(path, "--out", replace=arguments.replace)
    for path, data in zip(paths, draw_architecture()):
        write_new(path, data, replace=arguments.replace)
        say(str(path))


if __name__ == "__main__":
    run_command(main)
