"""Images that are no scenes of nano: textures, blurs, scribbles and crowds of polygons, drawn from a seed.

A model that has met only scenes describes shapes in whatever it is shown. With these, and with photographs, it learns
to say what it knows instead.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from qllava.nano.scenes import SIZE


def _colour(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def _clouds(rng: random.Random) -> Image.Image:
    """Soft noise of several scales, as of a landscape out of focus."""
    noise = np.random.default_rng(rng.randrange(1 << 30))
    total = np.zeros((SIZE, SIZE, 3))
    for side in (2, 4, 8, 16, 32):
        layer = Image.fromarray(noise.integers(0, 256, (side, side, 3), dtype=np.uint8))
        total += np.asarray(layer.resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.float64) / side**0.6
    total -= total.min()
    return Image.fromarray((total / total.max() * 255).astype(np.uint8))


def _texture(rng: random.Random) -> Image.Image:
    """Waves of a few directions in a few colours, as of cloth, brick or water."""
    ys, xs = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    total = np.zeros((SIZE, SIZE, 3))
    for _ in range(rng.randint(2, 5)):
        wave = np.sin(xs * rng.uniform(-80, 80) + ys * rng.uniform(-80, 80) + rng.uniform(0, 6))
        total += wave[..., None] * np.array(_colour(rng)) / 2
    return Image.fromarray(np.clip(total / 2 + np.array(_colour(rng)), 0, 255).astype(np.uint8))


def _polygons(rng: random.Random) -> Image.Image:
    """Many overlapping polygons of any form and colour, some blurred."""
    image = Image.new("RGB", (SIZE, SIZE), _colour(rng))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(12, 60)):
        x, y, reach = rng.uniform(0, SIZE), rng.uniform(0, SIZE), rng.uniform(6, 50)
        corners = [(x + rng.uniform(-reach, reach), y + rng.uniform(-reach, reach)) for _ in range(rng.randint(3, 8))]
        draw.polygon(corners, fill=_colour(rng))
    return image.filter(ImageFilter.GaussianBlur(rng.choice((0.0, 0.5, 1.0, 2.5))))


def _scribbles(rng: random.Random) -> Image.Image:
    """Lines and arcs, as of handwriting or a plan."""
    image = Image.new("RGB", (SIZE, SIZE), _colour(rng))
    draw = ImageDraw.Draw(image)
    ink = _colour(rng)
    for _ in range(rng.randint(10, 50)):
        x, y = rng.uniform(-5, SIZE), rng.uniform(-5, SIZE)
        box = (x, y, x + rng.uniform(4, 40), y + rng.uniform(4, 40))
        if rng.random() < 0.5:
            draw.line(box, fill=ink, width=rng.randint(1, 3))
        else:
            draw.arc(box, rng.randrange(360), rng.randrange(360), fill=ink, width=rng.randint(1, 3))
    return image


def _noise(rng: random.Random) -> Image.Image:
    """Nothing but noise of one strength around one colour."""
    noise = np.random.default_rng(rng.randrange(1 << 30))
    return Image.fromarray(
        np.clip(noise.normal(_colour(rng), rng.uniform(5, 90), (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
    )


_DRAW: tuple[Callable[[random.Random], Image.Image], ...] = (
    _clouds, _clouds, _texture, _polygons, _polygons, _scribbles, _noise,
)  # fmt: skip


def draw(rng: random.Random) -> Image.Image:
    """Return an image that shows no scene: RGB, `SIZE` x `SIZE`; the same state of `rng` gives the same bytes."""
    return rng.choice(_DRAW)(rng)
