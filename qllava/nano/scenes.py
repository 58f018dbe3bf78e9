"""The world of nano: small images of coloured shapes, drawn from a seed.

A scene is a 96 x 96 image of two to five shapes. The image has nine places of 32 x 32 pixels. A shape
is inside one place, and each place has at most one shape, so "top left" has one meaning:

    top left    | top    | top right
    ------------+--------+-------------
    left        | centre | right
    ------------+--------+-------------
    bottom left | bottom | bottom right

Within a scene no two shapes share both colour and form: "the red circle" always names one shape. A few colour-form
pairs (`UNSEEN_PAIRS`) are drawn only where `unseen=True` asks for them; no training image shows one.

Everything follows from the seed; the splits cannot meet because a scene belongs to a split by the hash of its layout.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Sequence
from colorsys import hsv_to_rgb
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

SIZE = 96
"""Width and height of an image in pixels."""
CELL = SIZE // 3

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 38, 44),
    "orange": (248, 138, 18),
    "yellow": (250, 226, 52),
    "green": (40, 160, 66),
    "blue": (38, 82, 214),
    "purple": (150, 52, 190),
}
FORMS = ("circle", "square", "triangle", "cross", "star", "ring")
SIZES: dict[str, float] = {"small": 12.0, "medium": 19.0, "large": 28.0}
"""Diameter in pixels."""
PLACES = (
    "top left", "top", "top right",
    "left", "centre", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
UNSEEN_PAIRS = frozenset({("red", "star"), ("blue", "ring"), ("yellow", "cross"), ("green", "square")})
Split = Literal["train", "validation", "test"]

_BACKGROUNDS = (
    (236, 233, 226), (202, 208, 212), (150, 156, 160), (94, 98, 106), (44, 46, 54), (20, 22, 26),
    (214, 200, 178), (168, 150, 130), (92, 80, 72), (188, 204, 190), (206, 192, 204), (70, 84, 92),
)  # fmt: skip
_OVERSAMPLE = 4


@dataclass(frozen=True)
class Shape:
    """One shape of a scene."""

    form: str
    """One of `FORMS`."""
    colour: str
    """A key of `COLOURS`."""
    size: str
    """A key of `SIZES`."""
    cell: int
    """Which of the nine places, an index into `PLACES`, in reading order."""
    x: float
    """Centre, in pixels from the left edge of the image."""
    y: float
    """Centre, in pixels from the top edge of the image."""
    angle: float
    """Rotation in degrees; small, so that a square is never a diamond."""

    @property
    def place(self) -> str:
        """The name of the place, one of `PLACES`."""
        return PLACES[self.cell]

    @property
    def row(self) -> int:
        """0 at the top, 2 at the bottom."""
        return self.cell // 3

    @property
    def column(self) -> int:
        """0 at the left, 2 at the right."""
        return self.cell % 3

    @property
    def box(self) -> tuple[float, float, float, float]:
        """x1, y1, x2, y2 in pixels."""
        r = SIZES[self.size] / 2
        return (self.x - r, self.y - r, self.x + r, self.y + r)


@dataclass(frozen=True)
class Scene:
    """The content of an image."""

    shapes: tuple[Shape, ...]
    """The shapes in reading order."""
    background: int
    """Seed of the background's colour and texture."""


def split_of(shapes: tuple[Shape, ...]) -> Split:
    """Return the split of a layout, by a hash: equal layouts are in the same split, so splits share no layout."""
    layout = "|".join(f"{s.size} {s.colour} {s.form} {s.cell}" for s in shapes)
    share = zlib.crc32(layout.encode()) % 20
    return "test" if share < 2 else "validation" if share < 3 else "train"


def _draw_shape_attributes(rng: random.Random, earlier: list[tuple[str, str]], unseen: bool) -> tuple[str, str]:
    """Return a (colour, form) that is new in this scene; half of them share one of the two with an earlier shape.

    In such scenes "red" alone or "circle" alone does not answer the question.
    """
    while True:
        colour, form = rng.choice(list(COLOURS)), rng.choice(FORMS)
        if earlier and rng.random() < 0.5:
            echo = rng.choice(earlier)
            colour, form = (echo[0], form) if rng.random() < 0.5 else (colour, echo[1])
        if (colour, form) not in earlier and (unseen or (colour, form) not in UNSEEN_PAIRS):
            return colour, form


def sample_scene(rng: random.Random, split: Split = "train", *, unseen: bool = False) -> Scene:
    """Return a random scene of a split. With `unseen` it has at least one pair of `UNSEEN_PAIRS`, else none."""
    while True:
        cells = sorted(rng.sample(range(9), rng.randint(2, 5)))
        pairs: list[tuple[str, str]] = []
        if unseen:
            pairs.append(rng.choice(sorted(UNSEEN_PAIRS)))
        while len(pairs) < len(cells):
            pairs.append(_draw_shape_attributes(rng, pairs, unseen))
        rng.shuffle(pairs)
        shapes = tuple(_place(rng, colour, form, cell) for (colour, form), cell in zip(pairs, cells, strict=True))
        if split_of(shapes) == split:
            return Scene(shapes, rng.randrange(1 << 30))


def _place(rng: random.Random, colour: str, form: str, cell: int) -> Shape:
    size = rng.choice(list(SIZES))
    slack = max(0.0, (CELL - SIZES[size]) / 2 - 2)
    x = (cell % 3 + 0.5) * CELL + rng.uniform(-slack, slack)
    y = (cell // 3 + 0.5) * CELL + rng.uniform(-slack, slack)
    return Shape(form, colour, size, cell, round(x, 2), round(y, 2), round(rng.uniform(-12, 12), 1))


def render(scene: Scene, colours: Sequence[tuple[int, int, int]] | None = None) -> Image.Image:
    """Return the image of a scene: RGB, `SIZE` x `SIZE`. The same scene gives the same bytes.

    If `colours` is given, the shapes are painted in these colours, in their order.
    """
    rng = np.random.default_rng(scene.background)
    canvas = _background(rng)
    for shape, colour in zip(scene.shapes, colours or [COLOURS[s.colour] for s in scene.shapes], strict=True):
        _paint(canvas, shape, colour, rng)
    noise = rng.normal(0.0, 3.0, canvas.shape)
    return Image.fromarray(np.clip(canvas + noise, 0, 255).astype(np.uint8))


def _background(rng: np.random.Generator) -> np.ndarray:
    """Return (SIZE, SIZE, 3) floats: a muted colour with a slope of light; half have faint stripes or checks."""
    base = np.array(_BACKGROUNDS[rng.integers(len(_BACKGROUNDS))], dtype=np.float64) + rng.normal(0, 6, 3)
    ys, xs = np.mgrid[0:SIZE, 0:SIZE] / SIZE - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    light = rng.uniform(0, 40) * (np.cos(angle) * xs + np.sin(angle) * ys)
    kind = rng.integers(4)
    if kind == 0:
        light += 7 * np.sign(np.sin((np.cos(angle) * xs - np.sin(angle) * ys) * rng.uniform(20, 60)))
    elif kind == 1:
        period = rng.uniform(20, 50)
        light += 7 * np.sign(np.sin(xs * period) * np.sin(ys * period))
    canvas: np.ndarray = base + light[..., None]
    return canvas


def nameless_colour(rng: random.Random) -> tuple[int, int, int]:
    """Return a strong colour that no word of `COLOURS` fits: cyan, pink, lime, brown and the like."""
    while True:
        drawn = [round(255 * c) for c in hsv_to_rgb(rng.random(), rng.uniform(0.45, 1), rng.uniform(0.45, 1))]
        if all(math.dist(drawn, named) > 80 for named in COLOURS.values()):
            return drawn[0], drawn[1], drawn[2]


def _paint(canvas: np.ndarray, shape: Shape, rgb: tuple[int, int, int], rng: np.random.Generator) -> None:
    """Blend one shape into the canvas in place; its edge is smooth and its colour varies a little."""
    radius = SIZES[shape.size] / 2
    left, top = int(shape.x - radius) - 3, int(shape.y - radius) - 3
    width = int(2 * radius) + 8
    mask = Image.new("L", (width * _OVERSAMPLE, width * _OVERSAMPLE))
    centre = ((shape.x - left) * _OVERSAMPLE, (shape.y - top) * _OVERSAMPLE)
    _draw(ImageDraw.Draw(mask), shape, centre, radius * _OVERSAMPLE)
    alpha = np.asarray(mask.reduce(_OVERSAMPLE), dtype=np.float64)[..., None] / 255
    colour = np.array(rgb, dtype=np.float64) + rng.normal(0, 7, 3)
    top_, left_ = max(top, 0), max(left, 0)
    region = canvas[top_ : top + width, left_ : left + width]
    alpha = alpha[top_ - top : top_ - top + region.shape[0], left_ - left : left_ - left + region.shape[1]]
    region *= 1 - alpha
    region += alpha * colour


def _draw(draw: ImageDraw.ImageDraw, shape: Shape, centre: tuple[float, float], r: float) -> None:
    """Fill the form, white on black, around `centre` with circumscribed radius about `r`."""
    cx, cy = centre
    if shape.form in ("circle", "ring"):
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=255)
        if shape.form == "ring":
            inner = 0.55 * r
            draw.ellipse((cx - inner, cy - inner, cx + inner, cy + inner), fill=0)
        return
    if shape.form == "square":
        corners = [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]
    elif shape.form == "triangle":
        corners = [(0.0, -1.0), (0.98, 0.8), (-0.98, 0.8)]
    elif shape.form == "cross":
        a, b = 0.32, 1.0
        corners = [
            (-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a),
            (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a),
        ]  # fmt: skip
    else:
        tips = [(k * np.pi / 5, 1.08 if k % 2 == 0 else 0.45) for k in range(10)]
        corners = [(float(q * np.sin(t)), float(-q * np.cos(t))) for t, q in tips]
    turn = np.deg2rad(shape.angle)
    cos, sin = float(np.cos(turn)), float(np.sin(turn))
    draw.polygon([(cx + r * (x * cos - y * sin), cy + r * (x * sin + y * cos)) for x, y in corners], fill=255)
