"""The toy world: what a scene is made of, how one is composed at random, and how it is painted.

Everything is a pure function of the random generator it is given, so the same seed paints the same bytes. Composing
a scene costs no painting, which makes scenes that are only talked about (text corpora) cheap.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from PIL import Image, ImageDraw

IMAGE_SIZE = 64  # pixels, both ways
MARGIN = 6.0  # pixels by which two centres must differ before anything is said about left, right, above or below
GAP = 2.0  # pixels between two objects, and between an object and the border, at the least
OVERSAMPLING = (
    4  # scenes are painted this much larger and averaged down, which is the anti-aliasing
)
MAX_OBJECTS = 4

# English name -> Chinese name. The English names are the keys used in code and in the records' `objects`.
SHAPES = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "star": "五角星",
    "diamond": "菱形",
    "ring": "圆环",
    "cross": "十字形",
    "heart": "心形",
}
COLOURS = {
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "blue": "蓝色",
    "purple": "紫色",
    "white": "白色",
    "black": "黑色",
}
SIZES = {"big": "大", "small": "小"}

RGB = {
    "red": (215, 30, 40),
    "orange": (245, 130, 20),
    "yellow": (250, 225, 40),
    "green": (30, 150, 60),
    "blue": (35, 85, 225),
    "purple": (150, 45, 190),
    "white": (247, 247, 247),
    "black": (20, 20, 20),
}
RADIUS = {"big": (9.4, 10.4), "small": (5.6, 6.2)}  # pixels: at least 2.3 times the area
BACKGROUNDS = ("plain", "stripes", "dots", "noise", "gradient")

Pair = tuple[str, str]  # (colour, shape)
ALL_PAIRS: tuple[Pair, ...] = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
# Each colour once and each shape once. They are part of the world and not of the seed: pretrained weights that ship
# with nanovlm have never met them either.
HELD_OUT_PAIRS: tuple[Pair, ...] = (
    ("red", "star"),
    ("orange", "ring"),
    ("yellow", "heart"),
    ("green", "triangle"),
    ("blue", "diamond"),
    ("purple", "circle"),
    ("white", "cross"),
    ("black", "square"),
)
TRAIN_PAIRS: tuple[Pair, ...] = tuple(pair for pair in ALL_PAIRS if pair not in HELD_OUT_PAIRS)


@dataclass(frozen=True)
class SceneObject:
    """One thing: its names, its centre (x, y) and radius in pixels, its rotation in degrees and its exact colour."""

    size: str
    colour: str
    shape: str
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[int, int, int]

    @property
    def reach(self) -> float:
        """Pixels from the centre to the farthest point of the outline."""
        return self.radius * _REACH[self.shape]


@dataclass(frozen=True)
class Scene:
    """Objects from left to right on a background, which `background_seed` determines to the pixel."""

    objects: tuple[SceneObject, ...]
    background: str
    background_seed: int


def _regular(points: int, radius: float) -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / points for i in range(points)]
    return [(radius * math.sin(turn), -radius * math.cos(turn)) for turn in turns]


def _heart(points: int = 48) -> list[tuple[float, float]]:
    outline = []
    for i in range(points):
        t = 2 * math.pi * i / points
        height = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        outline.append((1.1 * math.sin(t) ** 3, -(height + 1.2) / 14.5))
    return outline


def _outlines() -> dict[str, list[tuple[float, float]]]:
    """Polygons around the origin, y downwards, drawn for a radius of one so that all shapes look equally large."""
    star = [
        point
        for pair in zip(_regular(5, 1.25), _regular(10, 0.52)[1::2], strict=True)
        for point in pair
    ]
    arm, width = 1.1, 0.36
    cross = [
        (-width, -arm),
        (width, -arm),
        (width, -width),
        (arm, -width),
        (arm, width),
        (width, width),
        (width, arm),
        (-width, arm),
        (-width, width),
        (-arm, width),
        (-arm, -width),
        (-width, -width),
    ]
    # A ring is one path: once around outside, across, and back around inside.
    outer, inner = _regular(48, 1.05), _regular(48, 0.52)
    return {
        "circle": _regular(48, 1.0),
        "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
        "triangle": [(0.0, -1.2), (1.1, 0.7), (-1.1, 0.7)],
        "star": star,
        "diamond": [(0.0, -1.25), (0.82, 0.0), (0.0, 1.25), (-0.82, 0.0)],
        "ring": [*outer, outer[0], inner[0], *reversed(inner)],
        "cross": cross,
        "heart": _heart(),
    }


_OUTLINES = _outlines()
_REACH = {shape: max(math.hypot(x, y) for x, y in outline) for shape, outline in _OUTLINES.items()}


def random_scene(rng: Random, pairs: Sequence[Pair] = TRAIN_PAIRS) -> Scene:
    """Compose one to four objects, each number equally likely, with distinct (colour, shape) pairs out of `pairs`.

    Objects keep `GAP` pixels from each other and from the border; their centres differ by at least `MARGIN` in x, so
    that "from left to right" is never in doubt.
    """
    count = rng.randint(1, MAX_OBJECTS)
    while True:
        named = [random_object(rng, pair) for pair in rng.sample(pairs, count)]
        placed = _place(rng, named)
        if placed is not None:
            objects = tuple(sorted(placed, key=lambda thing: thing.x))
            return Scene(objects, rng.choice(BACKGROUNDS), rng.getrandbits(48))


def random_object(rng: Random, pair: Pair) -> SceneObject:
    """An object without a place yet."""
    colour, shape = pair
    size = rng.choice(list(SIZES))
    rgb = tuple(min(255, max(0, channel + rng.randint(-14, 14))) for channel in RGB[colour])
    return SceneObject(
        size, colour, shape, 0.0, 0.0, rng.uniform(*RADIUS[size]), rng.uniform(-10, 10), rgb
    )


def _place(
    rng: Random, objects: list[SceneObject], attempts: int = 300
) -> list[SceneObject] | None:
    """Find places for all objects, or None when luck ran out (four big ones hardly fit)."""
    for _ in range(attempts):
        placed: list[SceneObject] = []
        for thing in objects:
            free = thing.reach + GAP
            x, y = (round(rng.uniform(free, IMAGE_SIZE - free), 1) for _ in range(2))
            candidate = replace(thing, x=x, y=y)
            if not all(_apart(candidate, other) for other in placed):
                break
            placed.append(candidate)
        else:
            return placed
    return None


def _apart(one: SceneObject, other: SceneObject) -> bool:
    distance = math.hypot(one.x - other.x, one.y - other.y)
    return distance >= one.reach + other.reach + GAP and abs(one.x - other.x) >= MARGIN


def draw(scene: Scene) -> Image.Image:
    """Paint a scene: an RGB image of 64×64 pixels."""
    canvas = _paint_background(scene.background, Random(scene.background_seed))
    painter = ImageDraw.Draw(canvas)
    for thing in scene.objects:
        turn = math.radians(thing.angle)
        cos, sin = math.cos(turn) * thing.radius, math.sin(turn) * thing.radius
        # Pillow names pixels by their corner in outlines and by their centre in areas, hence the half pixel.
        outline = [
            (thing.x + cos * x - sin * y, thing.y + sin * x + cos * y)
            for x, y in _OUTLINES[thing.shape]
        ]
        painter.polygon(
            [(OVERSAMPLING * x - 0.5, OVERSAMPLING * y - 0.5) for x, y in outline], fill=thing.rgb
        )
    return canvas.reduce(OVERSAMPLING)


def _paint_background(kind: str, rng: Random) -> Image.Image:
    """Muted colours of middle brightness, so that white, black and all the bright colours stand out."""
    side = IMAGE_SIZE * OVERSAMPLING
    base = rng.uniform(112, 160)
    dark = tuple(round(base + rng.uniform(-14, 14)) for _ in range(3))
    lift = rng.uniform(12, 22)
    light = tuple(round(channel + lift) for channel in dark)
    canvas = Image.new("RGB", (side, side), dark)
    painter = ImageDraw.Draw(canvas)
    period = rng.uniform(5, 9) * OVERSAMPLING
    if kind == "stripes":
        slope = rng.choice((0.0, 0.5, 1.0))
        upright = rng.random() < 0.5
        for i in range(-math.ceil(side / period), math.ceil(side / period)):
            near, far, half = i * period, i * period + slope * side, period / 2
            band = [(near, 0), (near + half, 0), (far + half, side), (far, side)]
            painter.polygon(band if upright else [(y, x) for x, y in band], fill=light)
    elif kind == "dots":
        shift, radius = rng.uniform(0, period), period * 0.24
        for row in range(-1, math.ceil(side / period) + 1):
            for column in range(-1, math.ceil(side / period) + 1):
                x, y = (column + 0.5 * (row % 2)) * period + shift, row * period + shift
                painter.ellipse((x - radius, y - radius, x + radius, y + radius), fill=light)
    elif kind == "noise":
        grain = Image.frombytes("L", (IMAGE_SIZE, IMAGE_SIZE), rng.randbytes(IMAGE_SIZE**2)).resize(
            (side, side), 0
        )
        canvas = Image.composite(Image.new("RGB", (side, side), light), canvas, grain)
    elif kind == "gradient":
        ramp = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize((side, side))
        brighter = tuple(round(channel + 1.5 * lift) for channel in dark)
        canvas = Image.composite(Image.new("RGB", (side, side), brighter), canvas, ramp)
    return canvas
