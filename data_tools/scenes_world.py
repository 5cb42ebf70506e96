"""The toy world: the parts of a scene, composing one at random, and drawing it.

Everything is a pure function of the random generator that is passed in, so the same seed gives the
same bytes. A scene is composed without being drawn, which makes corpora of text alone cheap.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from PIL import Image, ImageDraw

IMAGE_SIZE = 64  # pixels, both ways
MARGIN = 6.0  # pixels by which two centres must differ to be called left, right, above or below
GAP = 2.0  # pixels at least between two objects, and between an object and the border
OVERSAMPLING = 4  # for anti-aliasing, scenes are drawn this much larger and averaged down
MAX_OBJECTS = 4

# English to Chinese names. Code and the records' `objects` use the English ones.
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
# Each colour once and each shape once. They are the same for every seed, because the pretrained
# weights that ship with nanovlm were not trained on them either.
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
    """An object: its names, centre and radius in pixels, rotation in degrees and exact colour."""

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
    """Objects from left to right, and a background that `background_seed` makes exact."""

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
    """Polygons around the origin, y downwards, for a radius of one; all look equally large."""
    tips, notches = _regular(5, 1.25), _regular(10, 0.52)[1::2]
    star = [point for pair in zip(tips, notches, strict=True) for point in pair]
    a, w = 1.1, 0.36  # length and half the width of an arm
    cross = [
        *((-w, -a), (w, -a), (w, -w), (a, -w), (a, w), (w, w)),
        *((w, a), (-w, a), (-w, w), (-a, w), (-a, -w), (-w, -w)),
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
    """Compose a scene of one to four objects, equally likely, of distinct (colour, shape) `pairs`.

    Objects are at least `GAP` pixels from each other and from the border. Their centres differ by
    at least `MARGIN` in x, so that their order from left to right is clear.
    """
    count = rng.randint(1, MAX_OBJECTS)
    while True:
        named = [random_object(rng, pair) for pair in rng.sample(pairs, count)]
        placed = _place(rng, named)
        if placed is not None:
            objects = tuple(sorted(placed, key=lambda thing: thing.x))
            return Scene(objects, rng.choice(BACKGROUNDS), rng.getrandbits(48))


def random_object(rng: Random, pair: Pair) -> SceneObject:
    """An object without a position."""
    colour, shape = pair
    size = rng.choice(list(SIZES))
    red, green, blue = (min(255, max(0, c + rng.randint(-14, 14))) for c in RGB[colour])
    radius, angle = rng.uniform(*RADIUS[size]), rng.uniform(-10, 10)
    return SceneObject(size, colour, shape, 0.0, 0.0, radius, angle, (red, green, blue))


def _place(
    rng: Random, objects: list[SceneObject], attempts: int = 300
) -> list[SceneObject] | None:
    """The objects at random positions, or None if they do not fit (four big ones hardly do)."""
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
    """Draw a scene: an RGB image of 64×64 pixels."""
    canvas = _paint_background(scene.background, Random(scene.background_seed))
    painter = ImageDraw.Draw(canvas)
    for thing in scene.objects:
        painter.polygon(_outline(thing), fill=thing.rgb)
    return canvas.reduce(OVERSAMPLING)


def coverage(thing: SceneObject) -> Image.Image:
    """How much of each pixel an object covers, from 0 to 255: a grey image of 64×64 pixels."""
    side = IMAGE_SIZE * OVERSAMPLING
    canvas = Image.new("L", (side, side))
    ImageDraw.Draw(canvas).polygon(_outline(thing), fill=255)
    return canvas.reduce(OVERSAMPLING)


def _outline(thing: SceneObject) -> list[tuple[float, float]]:
    """An object's outline on the larger canvas."""
    turn = math.radians(thing.angle)
    cos, sin = math.cos(turn) * thing.radius, math.sin(turn) * thing.radius
    # Pillow's coordinates of a polygon are pixel centres, ours are corners: half a pixel less.
    outline = [
        (thing.x + cos * x - sin * y, thing.y + sin * x + cos * y)
        for x, y in _OUTLINES[thing.shape]
    ]
    return [(OVERSAMPLING * x - 0.5, OVERSAMPLING * y - 0.5) for x, y in outline]


def _paint_background(kind: str, rng: Random) -> Image.Image:
    """Muted colours of middle brightness, so that objects of all colours stand out."""
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
        pixels = rng.randbytes(IMAGE_SIZE**2)
        grain = Image.frombytes("L", (IMAGE_SIZE, IMAGE_SIZE), pixels).resize((side, side), 0)
        canvas = Image.composite(Image.new("RGB", (side, side), light), canvas, grain)
    elif kind == "gradient":
        ramp = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize((side, side))
        brighter = tuple(round(channel + 1.5 * lift) for channel in dark)
        canvas = Image.composite(Image.new("RGB", (side, side), brighter), canvas, ramp)
    return canvas
