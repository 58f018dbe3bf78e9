"""What can be said about a scene of nano: captions, questions with one right answer, descriptions, reasoning, maps.

Every sentence here follows from the scene alone. A question is asked only where its answer is beyond doubt: a shape is
named by what it alone has ("the star" where there is one star), sizes are compared only where they differ.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from qllava.nano.scenes import CELL, COLOURS, FORMS, PLACES, SIZES, UNSEEN_PAIRS, Scene, Shape

TYPES = ("colour", "form", "size", "place", "count", "presence", "relation", "comparison")
"""The question types; evaluation asks each of them equally often."""

MAP_SIDE = 6
"""A map has as many rows and columns as the tower has patches."""
MAP_BLANK = "."
AT = {
    "top left": "at the top left", "top": "at the top", "top right": "at the top right",
    "left": "on the left", "centre": "in the centre", "right": "on the right",
    "bottom left": "at the bottom left", "bottom": "at the bottom", "bottom right": "at the bottom right",
}  # fmt: skip
"""The words for a place in a sentence."""
_LOOK = ("What do you see?", "Describe the picture.", "What is in the picture?", "Tell me what the picture shows.")


@dataclass(frozen=True)
class Question:
    """A question about an image with one right answer."""

    type: str
    """One of `TYPES`."""
    text: str
    """The question as a person would ask it."""
    answer: str
    """The one right answer, one or two words."""
    reason: str
    """A sentence from which the answer follows."""


def article(words: str) -> str:
    """Return `words` with "a" or "an" before them."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def full_caption(scene: Scene, *, colours: bool = True, forms: bool = True) -> str:
    """Return a caption that names size, colour, form and place of every shape, in reading order.

    Without `colours` the colours are left out; without `forms` each form is called "shape".
    """
    parts = []
    for s in scene.shapes:
        colour, form = f"{s.colour} " if colours else "", s.form if forms else "shape"
        parts.append(f"{article(f'{s.size} {colour}{form}')} {AT[s.place]}")
    return ", ".join(parts)


def captions(scene: Scene, rng: random.Random) -> list[str]:
    """Return five captions such as five people would write: each leaves something out (COCO has five per image)."""
    shapes = list(scene.shapes)
    kinds: list[Callable[[Shape], str]] = [
        lambda s: article(f"{s.size} {s.colour} {s.form}"),
        lambda s: article(f"{s.colour} {s.form}"),
        lambda s: f"{article(s.form)} {AT[s.place]}",
        lambda s: f"{article(f'{s.colour} {s.form}')} {AT[s.place]}",
        lambda s: article(f"{s.size} {s.form}"),
    ]
    out = []
    for say in kinds:
        chosen = sorted(rng.sample(shapes, rng.randint(2, len(shapes))), key=lambda s: s.cell)
        words = [say(s) for s in chosen]
        out.append(", ".join(words[:-1]) + " and " + words[-1])
    return out


def word_of(shape: Shape) -> str:
    """Return the one word that a map uses for a shape: "largeredcircletopleft". The word is a single token."""
    return f"{shape.size}{shape.colour}{shape.form}{shape.place.replace(' ', '')}"


def map_words() -> list[str]:
    """Return every word that a map can contain, the blank included."""
    names = ("".join(parts).replace(" ", "") for parts in product(SIZES, COLOURS, FORMS, PLACES))
    return [MAP_BLANK, *names]


def scene_map(scene: Scene) -> list[str]:
    """Return the image as `MAP_SIDE` x `MAP_SIDE` words in reading order: what covers most of each patch.

    A map's words correspond to the tower's image tokens, so a LLaMA that has read maps can use image tokens.
    """
    patch = 3 * CELL / MAP_SIDE
    out = []
    for k in range(MAP_SIDE * MAP_SIDE):
        left, top = (k % MAP_SIDE) * patch, (k // MAP_SIDE) * patch
        best, word = 0.12 * patch * patch, MAP_BLANK
        for shape in scene.shapes:
            x1, y1, x2, y2 = shape.box
            area = max(0.0, min(x2, left + patch) - max(x1, left)) * max(0.0, min(y2, top + patch) - max(y1, top))
            if area > best:
                best, word = area, word_of(shape)
        out.append(word)
    return out


def _names(scene: Scene, shape: Shape, *, without: tuple[str, ...] = ()) -> list[str]:
    """Return the ways to name exactly this shape that do not mention an attribute in `without`."""
    others = [s for s in scene.shapes if s is not shape]
    out = []
    if "colour" not in without and "form" not in without:
        out += [f"the {shape.colour} {shape.form}"] * 2
    if "form" not in without and all(s.form != shape.form for s in others):
        out.append(f"the {shape.form}")
    if "colour" not in without and all(s.colour != shape.colour for s in others):
        out.append(f"the {shape.colour} shape")
    if "place" not in without:
        out.append(f"the shape {AT[shape.place]}")
    return out


def _ask_colour(scene: Scene, shape: Shape, rng: random.Random) -> Question:
    name = rng.choice(_names(scene, shape, without=("colour",)))
    return Question("colour", f"What colour is {name}?", shape.colour, _there(shape))


def _ask_form(scene: Scene, shape: Shape, rng: random.Random) -> Question:
    name = rng.choice(_names(scene, shape, without=("form",)))
    return Question("form", f"What form is {name}?", shape.form, _there(shape))


def _ask_size(scene: Scene, shape: Shape, rng: random.Random) -> Question:
    name = rng.choice(_names(scene, shape))
    return Question("size", f"What size is {name}?", shape.size, _there(shape))


def _ask_place(scene: Scene, shape: Shape, rng: random.Random) -> Question:
    name = rng.choice(_names(scene, shape, without=("place",)))
    return Question("place", f"Where is {name}?", shape.place, _there(shape))


def _there(*shapes: Shape) -> str:
    return "There is " + " and ".join(f"{article(f'{s.size} {s.colour} {s.form}')} {AT[s.place]}" for s in shapes) + "."


def _ask_count(scene: Scene, shape: Shape, rng: random.Random) -> Question:
    kind = rng.choice(("all", "colour", "form"))
    if kind == "all":
        found, text = list(scene.shapes), "How many shapes are there?"
    elif kind == "colour":
        colour = shape.colour if rng.random() < 0.8 else rng.choice(list(COLOURS))
        found, text = [s for s in scene.shapes if s.colour == colour], f"How many {colour} shapes are there?"
    else:
        form = shape.form if rng.random() < 0.8 else rng.choice(FORMS)
        plural = f"{form}es" if form == "cross" else f"{form}s"
        found, text = [s for s in scene.shapes if s.form == form], f"How many {plural} are there?"
    return Question("count", text, str(len(found)), _there(*found) if found else "There is none.")


def _ask_presence(scene: Scene, shape: Shape, rng: random.Random) -> Question:
    """Ask whether a shape is there: half yes; after a no, two shapes often have the colour and the form."""
    present = {(s.colour, s.form) for s in scene.shapes}
    if rng.random() < 0.5:
        return Question("presence", f"Is there {article(f'{shape.colour} {shape.form}')}?", "yes", _there(shape))
    unseen = bool(present & UNSEEN_PAIRS)
    colours = [s.colour for s in scene.shapes] + [rng.choice(list(COLOURS))]
    forms = [s.form for s in scene.shapes] + [rng.choice(FORMS)]
    avoided = present if unseen else present | UNSEEN_PAIRS
    absent = [(c, f) for c in colours for f in forms if (c, f) not in avoided]
    if not absent:
        return Question("presence", f"Is there {article(f'{shape.colour} {shape.form}')}?", "yes", _there(shape))
    colour, form = rng.choice(absent)
    seen = [s for s in scene.shapes if s.colour == colour or s.form == form]
    reason = _there(*seen) if seen else f"There is nothing {colour}."
    return Question("presence", f"Is there {article(f'{colour} {form}')}?", "no", reason)


def _ask_relation(scene: Scene, shape: Shape, rng: random.Random) -> Question:
    others = [s for s in scene.shapes if s.row != shape.row or s.column != shape.column]
    other = rng.choice(others)
    axes = [axis for axis in ("row", "column") if getattr(shape, axis) != getattr(other, axis)]
    axis = rng.choice(axes)
    before = getattr(shape, axis) < getattr(other, axis)
    says = rng.random() < 0.5
    first, second = ("above", "below") if axis == "row" else ("left of", "right of")
    relation = first if before == says else second
    a, b = (f"the {s.colour} {s.form}" for s in (shape, other))
    return Question("relation", f"Is {a} {relation} {b}?", "yes" if says else "no", _there(shape, other))


def _ask_comparison(scene: Scene, shape: Shape, rng: random.Random) -> Question | None:
    others = [s for s in scene.shapes if s.size != shape.size]
    if not others:
        return None
    other = rng.choice(others)
    larger = SIZES[shape.size] > SIZES[other.size]
    says = rng.random() < 0.5
    word = "larger" if larger == says else "smaller"
    a, b = (f"the {s.colour} {s.form}" for s in (shape, other))
    return Question("comparison", f"Is {a} {word} than {b}?", "yes" if says else "no", _there(shape, other))


_ASK: dict[str, Callable[[Scene, Shape, random.Random], Question | None]] = {
    "colour": _ask_colour,
    "form": _ask_form,
    "size": _ask_size,
    "place": _ask_place,
    "count": _ask_count,
    "presence": _ask_presence,
    "relation": _ask_relation,
    "comparison": _ask_comparison,
}


def ask(scene: Scene, type_: str, rng: random.Random, *, about: Shape | None = None) -> Question | None:
    """Return a question of a type about a scene, or about the shape `about`; None if the scene allows none."""
    return _ASK[type_](scene, about or rng.choice(scene.shapes), rng)


def questions(scene: Scene, rng: random.Random, count: int, types: tuple[str, ...] = TYPES) -> list[Question]:
    """Return up to `count` questions of types drawn from `types`.

    No text comes twice, but two texts may ask the same.
    """
    out: list[Question] = []
    for _ in range(10 * count):
        question = ask(scene, rng.choice(types), rng)
        if question is not None and question.text not in {q.text for q in out}:
            out.append(question)
        if len(out) == count:
            break
    return out


def detail(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Return a request for a description, and the detailed description."""
    count = len(scene.shapes)
    return rng.choice(_LOOK), f"There are {count} shapes: {full_caption(scene)}."


def reasoning(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Return a question that asks for its reasons, and the reasons followed by the answer."""
    question = None
    while question is None:
        question = ask(scene, rng.choice(TYPES), rng)
    return f"{question.text} Give your reasons.", f"{question.reason} So the answer is {question.answer}."
