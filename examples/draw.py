"""Draw the example data of this folder: things on a table, with questions, captions and boxes about them.

    python examples/draw.py            # writes the files again; they are the same

Everything here is drawn by this file (and the scenes by nano), so that it may be used like the rest of qllava.

    images/00.png ... 23.png    a table with one to seven things: fruit, cups and books
    mine.json                   LLaVA's format: three questions about each of the first 18 images
    held_out.json               the same about the other six
    captions.json               a caption of each image, for `qllava filter` and pretraining
    contexts.jsonl              captions and boxes of each image, for `qllava synthesize`
    scenes/1.png ... 3.png      three of nano's scenes that it was not trained on
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from qllava.nano.scenes import render, sample_scene

FOLDER = Path(__file__).resolve().parent
WIDTH, HEIGHT, CELL = 160, 120, 40
IMAGES, LEARNED = 24, 18
THINGS = {
    "apple": ("red", "green"),
    "orange": ("orange",),
    "banana": ("yellow",),
    "cup": ("blue", "white"),
    "book": ("purple", "black"),
}
"""Kinds of things, by COCO's names, and the colours that each may have."""
PAINT = {
    "red": (200, 40, 40), "green": (90, 160, 60), "orange": (240, 140, 30), "yellow": (240, 210, 60),
    "blue": (50, 90, 190), "white": (240, 240, 235), "purple": (120, 60, 150), "black": (40, 40, 45),
}  # fmt: skip
NUMBERS = ("no", "one", "two", "three")

Box = tuple[int, int, int, int]


def table(rng: random.Random) -> tuple[Image.Image, list[tuple[str, str, Box]]]:
    """Return an image, and kind, colour and box (pixels) of each thing on it; all of one kind have one colour."""
    image = Image.new("RGB", (WIDTH, HEIGHT), (150 + rng.randrange(30), 115, 80))
    draw = ImageDraw.Draw(image)
    for y in range(rng.randrange(8, 16), HEIGHT, 16):
        draw.line((0, y, WIDTH, y), fill=(135, 100, 70))
    cells = rng.sample(range(WIDTH // CELL * (HEIGHT // CELL)), 12)
    things = []
    for kind in rng.sample(sorted(THINGS), rng.randint(1, 3)):
        colour = rng.choice(THINGS[kind])
        for _ in range(rng.randint(1, 3)):
            row, column = divmod(cells.pop(), WIDTH // CELL)
            x, y = column * CELL + rng.randrange(4, 9), row * CELL + rng.randrange(4, 9)
            things.append((kind, colour, paint(draw, kind, colour, x, y)))
    return image, things


def paint(draw: ImageDraw.ImageDraw, kind: str, colour: str, x: int, y: int) -> Box:
    """Paint one thing whose upper left corner is (x, y), and return its box."""
    fill, dark = PAINT[colour], (60, 45, 30)
    if kind in ("apple", "orange"):
        draw.ellipse((x, y + 4, x + 24, y + 28), fill=fill, outline=dark)
        draw.line((x + 12, y + 5, x + 14, y), fill=dark, width=2)
        return x, y, x + 24, y + 28
    if kind == "banana":
        draw.chord((x, y - 18, x + 30, y + 22), 10, 170, fill=fill, outline=dark)
        return x, y + 5, x + 30, y + 22
    if kind == "cup":
        draw.ellipse((x + 14, y + 8, x + 28, y + 22), outline=fill, width=3)
        draw.rectangle((x, y + 2, x + 20, y + 26), fill=fill, outline=dark)
        return x, y + 2, x + 28, y + 26
    draw.rectangle((x, y, x + 22, y + 28), fill=fill, outline=dark)
    draw.line((x + 4, y, x + 4, y + 28), fill=dark)
    return x, y, x + 22, y + 28


def questions(rng: random.Random, counts: dict[str, int], colours: dict[str, str]) -> list[tuple[str, str]]:
    """Return three questions about an image with their answers: how many, which colour, is there one."""
    counted, coloured = rng.choice(sorted(counts)), rng.choice(sorted(counts))
    sought = rng.choice(sorted(THINGS))
    return [
        (f"How many {counted}s are there?", NUMBERS[counts[counted]]),
        (f"What colour {is_are(counts[coloured])} the {named(coloured, counts[coloured])}?", colours[coloured]),
        (f"Is there {article(sought)} {sought} on the table?", "yes" if sought in counts else "no"),
    ]


def is_are(number: int) -> str:
    """Return the verb for so many things."""
    return "is" if number == 1 else "are"


def named(kind: str, number: int) -> str:
    """Return the name of so many things of a kind."""
    return kind if number == 1 else f"{kind}s"


def article(word: str) -> str:
    """Return "a" or "an"."""
    return "an" if word[0] in "aeiou" else "a"


def caption(counts: dict[str, int], colours: dict[str, str]) -> str:
    """Return a caption that names everything on the table."""
    parts = [f"{NUMBERS[number]} {colours[kind]} {named(kind, number)}" for kind, number in counts.items()]
    listed = " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
    return f"{listed.capitalize()} on a wooden table."


def shares(box: Box) -> list[float]:
    """Return a box in shares of the image's width and height."""
    return [round(value / (HEIGHT if place % 2 else WIDTH), 4) for place, value in enumerate(box)]


def draw_all(folder: Path) -> None:
    """Write all files of this folder into another one."""
    for name in ("images", "scenes"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    examples: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    contexts: list[dict[str, Any]] = []
    for number in range(IMAGES):
        rng, file = random.Random(f"table-{number}"), f"{number:02d}.png"
        image, things = table(rng)
        image.save(folder / "images" / file)
        counts = {kind: sum(kind == other for other, *_ in things) for kind, *_ in things}
        colours = {kind: colour for kind, colour, _ in things}
        text = caption(counts, colours)
        turns = [
            turn
            for place, (question, answer) in enumerate(questions(rng, counts, colours))
            for turn in (
                {"from": "human", "value": f"<image>\n{question}" if place == 0 else question},
                {"from": "gpt", "value": answer},
            )
        ]
        examples.append({"id": f"table-{number:02d}", "image": file, "conversations": turns})
        asked = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": text}]
        captions.append({"id": f"table-{number:02d}", "image": file, "conversations": asked})
        boxes = [{"category": kind, "bbox": shares(box)} for kind, _, box in things]
        context = {"id": f"table-{number:02d}", "image": file, "captions": [text], "boxes": boxes, "complete": True}
        contexts.append(context)
    for name, content in {
        "mine.json": examples[:LEARNED],
        "held_out.json": examples[LEARNED:],
        "captions.json": captions,
    }.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    lines = "".join(json.dumps(context) + "\n" for context in contexts)
    (folder / "contexts.jsonl").write_text(lines, encoding="utf-8")
    for number in range(1, 4):
        render(sample_scene(random.Random(f"example-{number}"), "test")).save(folder / "scenes" / f"{number}.png")


if __name__ == "__main__":
    draw_all(FOLDER)
