"""Further questions about a scene: what people ask beside the eight types of `language`, each in one plain form.

Their answers follow from the scene alone, as those of `language` do. They are learned from, and are not in the table.
A question about a shape that is missing is answered so ("There is no star."), one about several by all of them ("red
and blue"), in reading order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from qllava.nano.language import AT, article
from qllava.nano.scenes import COLOURS, FORMS, PLACES, SIZES, UNSEEN_PAIRS, Scene, Shape

Pair = tuple[str, str]
"""A question in its plain form, and its answer."""
_OTHER_FORMS = (
    "heart",
    "hexagon",
    "diamond",
    "oval",
    "rectangle",
    "arrow",
    "moon",
    "pentagon",
    "cube",
    "spiral",
    "line",
)
_OTHER_COLOURS = ("pink", "brown", "black", "white", "grey", "gray", "cyan", "golden", "turquoise")
_NUMBERS = ("no", "one", "two", "three", "four", "five")
_COMPARED = (
    ("larger", False), ("smaller", True), ("higher", True), ("lower", False),
    ("further left", True), ("further right", False),
)  # fmt: skip
"""Words that compare two shapes, and whether the smaller measure is meant."""
_ATTRIBUTES = ("colour", "form", "size", "place")


def listed(words: Sequence[str]) -> str:
    """Return "red", "red and blue" or "red, blue and green"; "nothing" for no words."""
    if not words:
        return "nothing"
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def plural(form: str) -> str:
    """Return the plural of a form's name."""
    return f"{form}es" if form == "cross" else f"{form}s"


def _different(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _pair(shape: Shape) -> str:
    return f"{shape.colour} {shape.form}"


def _ask(attribute: str, name: str) -> str:
    return f"Where is {name}?" if attribute == "place" else f"What {attribute} is {name}?"


def _several(scene: Scene, rng: random.Random) -> Pair | None:
    """About one attribute of all shapes that a name fits, where it fits several."""
    shape = rng.choice(scene.shapes)
    by = rng.choice(("colour", "form"))
    meant = [s for s in scene.shapes if getattr(s, by) == getattr(shape, by)]
    if len(meant) < 2:
        return None
    attribute = rng.choice([a for a in _ATTRIBUTES if a != by])
    values = _different([getattr(s, attribute) for s in meant])
    if by == "form" and attribute == "colour" and rng.random() < 0.5:
        return f"Which colours do the {plural(shape.form)} have?", listed(values)
    if by == "colour" and rng.random() < 0.4:
        return f"Which shapes are {shape.colour}?", listed(_different([s.form for s in meant]))
    return _ask(attribute, f"the {shape.form}" if by == "form" else f"the {shape.colour} shape"), listed(values)


def _absent(scene: Scene, rng: random.Random) -> Pair:
    """About a shape that is not there."""
    forms, pairs = {s.form for s in scene.shapes}, {(s.colour, s.form) for s in scene.shapes}
    while True:
        colour, form = rng.choice([*COLOURS, *_OTHER_COLOURS[:3]]), rng.choice([*FORMS, *FORMS, *_OTHER_FORMS])
        name = form if rng.random() < 0.5 else f"{colour} {form}"
        if form not in forms if name == form else (colour, form) not in pairs | UNSEEN_PAIRS:
            break
    attribute = rng.choice(("colour", "size", "place", "place") if name == form else ("size", "place"))
    return _ask(attribute, f"the {name}"), f"There is no {name}."


def _no_such(scene: Scene, rng: random.Random) -> Pair:
    """Whether there is, or how many there are, of a form or colour that no scene has."""
    form, colour = rng.choice(_OTHER_FORMS), rng.choice(_OTHER_COLOURS)
    what = rng.choice((form, f"{rng.choice(list(COLOURS))} {form}", f"{colour} {rng.choice(FORMS)}"))
    if rng.random() < 0.5:
        return f"Is there {article(what)}?", "no"
    *before, last = what.split()
    return f"How many {' '.join([*before, plural(last)])} are there?", "0"


def _presence(scene: Scene, rng: random.Random) -> Pair:
    """Whether there is one of a form, of a colour or of a size, anywhere or at a place."""
    by = rng.choice(("colour", "form", "size"))
    value = rng.choice({"colour": tuple(COLOURS), "form": FORMS, "size": tuple(SIZES)}[by])
    answer = "yes" if any(getattr(s, by) == value for s in scene.shapes) else "no"
    named = article(value) if by == "form" else article(f"{value} shape")
    if by != "form" and rng.random() < 0.5:
        named = f"anything {value}"
    elif by == "form" and rng.random() < 0.4:
        return f"Are there any {plural(value)}?", answer
    elif rng.random() < 0.3:
        shape = rng.choice(scene.shapes)
        value = getattr(shape, by) if rng.random() < 0.5 else value
        named = article(value) if by == "form" else article(f"{value} shape")
        # Along a whole side, so that "on the left" is also true of a shape in its corner.
        there = [s for s in scene.shapes if shape.place in (s.place, *_sides(s))]
        said = "yes" if any(getattr(s, by) == value for s in there) else "no"
        return f"Is there {named} {AT[shape.place]}?", said
    return f"Is there {named}?", answer


def _sides(shape: Shape) -> tuple[str, ...]:
    """The sides of the image that a shape is along."""
    rows, columns = {0: "top", 2: "bottom"}, {0: "left", 2: "right"}
    return tuple(side for side in (rows.get(shape.row), columns.get(shape.column)) if side)


def _at(scene: Scene, rng: random.Random) -> Pair:
    """What is at a place; at the middle of a side that is empty, what is along that side."""
    shape = rng.choice(scene.shapes)
    place = shape.place if rng.random() < 0.7 else rng.choice(PLACES)
    found = [s for s in scene.shapes if s.place == place] or [s for s in scene.shapes if place in _sides(s)]
    return f"What is {AT[place]}?", listed([article(f"{s.size} {_pair(s)}") for s in found])


def _extreme(scene: Scene, rng: random.Random) -> Pair | None:
    """Which shape is the largest or smallest, or something about it, where there is one."""
    largest = rng.random() < 0.5
    sizes = [SIZES[s.size] for s in scene.shapes]
    wanted = max(sizes) if largest else min(sizes)
    if sizes.count(wanted) != 1:
        return None
    shape, word = scene.shapes[sizes.index(wanted)], "largest" if largest else "smallest"
    if rng.random() < 0.5:
        return f"Which shape is the {word}?", f"the {_pair(shape)}"
    attribute = rng.choice(("colour", "form", "place"))
    return _ask(attribute, f"the {word} shape"), getattr(shape, attribute)


def _lists(scene: Scene, rng: random.Random) -> Pair:
    """Which colours, forms or shapes there are, or how many colours."""
    if rng.random() < 0.35:
        return "Which shapes are there?", listed([_pair(s) for s in scene.shapes])
    by = rng.choice(("colour", "form"))
    values = _different([getattr(s, by) for s in scene.shapes])
    if by == "colour" and rng.random() < 0.35:
        return "How many colours are there?", str(len(values))
    return f"Which {by}s are there?", listed(values)


def _count(scene: Scene, rng: random.Random) -> Pair:
    """How many there are of a size, or of a pair of colour and form."""
    shape = rng.choice(scene.shapes)
    if rng.random() < 0.6:
        size = shape.size if rng.random() < 0.7 else rng.choice(list(SIZES))
        return f"How many {size} shapes are there?", str(sum(s.size == size for s in scene.shapes))
    return f"How many {shape.colour} {plural(shape.form)} are there?", "1"


def _verify(scene: Scene, rng: random.Random) -> Pair:
    """Whether a shape has a colour, form, size or place."""
    shape = rng.choice(scene.shapes)
    attribute = rng.choice(_ATTRIBUTES)
    only = {by: sum(getattr(s, by) == getattr(shape, by) for s in scene.shapes) == 1 for by in ("colour", "form")}
    names = [f"the {shape.form}"] * (only["form"] and attribute != "form")
    names += [f"the {shape.colour} shape"] * (only["colour"] and attribute != "colour")
    names += [f"the {_pair(shape)}"] * (attribute in ("size", "place"))
    names += [f"the shape {AT[shape.place]}"] * (attribute != "place")
    values = {"colour": tuple(COLOURS), "form": FORMS, "size": tuple(SIZES), "place": PLACES}[attribute]
    right = getattr(shape, attribute)
    value = right if rng.random() < 0.5 else rng.choice([v for v in values if v != right])
    said = article(value) if attribute == "form" else AT[value] if attribute == "place" else value
    return f"Is {rng.choice(names)} {said}?", "yes" if value == right else "no"


def _more(scene: Scene, rng: random.Random) -> Pair:
    """Whether there are more of one form or colour than of another."""
    shape = rng.choice(scene.shapes)
    by: str = rng.choice(("colour", "form"))
    first = getattr(shape, by)
    second = rng.choice([v for v in (COLOURS if by == "colour" else FORMS) if v != first])
    if rng.random() < 0.5:
        first, second = second, first
    numbers = [sum(getattr(s, by) == value for s in scene.shapes) for value in (first, second)]
    a, b = (f"{v} shapes" if by == "colour" else plural(v) for v in (first, second))
    return f"Are there more {a} than {b}?", "yes" if numbers[0] > numbers[1] else "no"


def _beside(scene: Scene, rng: random.Random) -> Pair:
    """What is above, below, left or right of a shape, by rows and columns of places."""
    shape = rng.choice(scene.shapes)
    relation = rng.choice(("above", "below", "left of", "right of"))
    axis, sign = (
        ("row" if relation in ("above", "below") else "column"),
        (-1 if relation in ("above", "left of") else 1),
    )
    here = getattr(shape, axis)
    found = [s for s in scene.shapes if sign * (getattr(s, axis) - here) > 0]
    return f"What is {relation} the {_pair(shape)}?", listed([article(_pair(s)) for s in found])


def _same(scene: Scene, rng: random.Random) -> Pair:
    """Whether two shapes, or all, have the same colour, form or size."""
    attribute = rng.choice(("colour", "form", "size"))
    if rng.random() < 0.2:
        same = len({getattr(s, attribute) for s in scene.shapes}) == 1
        return f"Do all shapes have the same {attribute}?", "yes" if same else "no"
    a, b = rng.sample(scene.shapes, 2)
    if attribute == "size":
        first, second = f"the {_pair(a)}", f"the {_pair(b)}"
    else:
        first, second = f"the shape {AT[a.place]}", f"the shape {AT[b.place]}"
    answer = "yes" if getattr(a, attribute) == getattr(b, attribute) else "no"
    return f"Do {first} and {second} have the same {attribute}?", answer


def _all(scene: Scene, rng: random.Random) -> Pair:
    """Whether all shapes have a colour or size, or whether there are more than so many."""
    shape = rng.choice(scene.shapes)
    if rng.random() < 0.35:
        limit = rng.randint(1, 5)
        return f"Are there more than {_NUMBERS[limit]} shapes?", "yes" if len(scene.shapes) > limit else "no"
    value = rng.choice((shape.colour, shape.size))
    every = "both shapes" if len(scene.shapes) == 2 and rng.random() < 0.6 else "all shapes"
    return f"Are {every} {value}?", "yes" if all(value in (s.colour, s.size) for s in scene.shapes) else "no"


def _either(scene: Scene, rng: random.Random) -> Pair:
    """Which of two values a shape has."""
    shape = rng.choice(scene.shapes)
    by = rng.choice(("colour", "form", "size"))
    values = {"colour": tuple(COLOURS), "form": FORMS, "size": tuple(SIZES)}[by]
    right = getattr(shape, by)
    pair = [right, rng.choice([v for v in values if v != right])]
    rng.shuffle(pair)
    said = [article(v) for v in pair] if by == "form" else pair
    only = by != "form" and sum(s.form == shape.form for s in scene.shapes) == 1
    name = f"the {shape.form}" if only else f"the {_pair(shape)}" if by == "size" else f"the shape {AT[shape.place]}"
    return f"Is {name} {said[0]} or {said[1]}?", right


def _of_two(scene: Scene, rng: random.Random) -> Pair | None:
    """Which of two shapes is larger, higher and so on, where one is."""
    a, b = rng.sample(scene.shapes, 2)
    word, low = rng.choice(_COMPARED)
    first, second = (_measure(s, word) for s in (a, b))
    if first == second:
        return None
    right = a if (first < second) == low else b
    names = [f"the {s.form}" for s in (a, b)]
    if any(sum(s.form == one.form for s in scene.shapes) > 1 for one in (a, b)):
        names = [f"the {_pair(s)}" for s in (a, b)]
    return f"Which is {word}, {names[0]} or {names[1]}?", f"the {_pair(right)}"


def _measure(shape: Shape, word: str) -> float:
    if word in ("larger", "smaller"):
        return SIZES[shape.size]
    return shape.row if word in ("higher", "lower") else shape.column


def _the(scene: Scene, rng: random.Random) -> Pair | None:
    """What the one shape of a colour is."""
    shape = rng.choice(scene.shapes)
    if sum(s.colour == shape.colour for s in scene.shapes) > 1:
        return None
    return f"What is the {shape.colour} shape?", article(f"{shape.size} {_pair(shape)}")


def _which(scene: Scene, rng: random.Random) -> Pair:
    """Which shapes have a colour or a size."""
    by = rng.choice(("colour", "size"))
    shape = rng.choice(scene.shapes)
    value = getattr(shape, by) if rng.random() < 0.8 else rng.choice(list(COLOURS if by == "colour" else SIZES))
    found = [s for s in scene.shapes if getattr(s, by) == value]
    words = [s.form if by == "colour" else _pair(s) for s in found]
    return f"Which shapes are {value}?", listed(_different(words))


_KINDS: tuple[tuple[Callable[[Scene, random.Random], Pair | None], int], ...] = (
    (_several, 3), (_absent, 3), (_no_such, 2), (_presence, 2), (_at, 4), (_extreme, 3), (_lists, 3), (_count, 2),
    (_verify, 4), (_more, 1), (_beside, 2), (_same, 2), (_which, 2),
    (_all, 2), (_either, 2), (_of_two, 2), (_the, 1),
)  # fmt: skip
"""What is asked, and how often."""
_ASKERS, _SHARES = [ask for ask, _ in _KINDS], [share for _, share in _KINDS]


def ask(scene: Scene, rng: random.Random) -> Pair:
    """Return one of these questions about a scene, in its plain form, and its answer."""
    while True:
        (kind,) = rng.choices(_ASKERS, _SHARES)
        if (asked := kind(scene, rng)) is not None:
            return asked


def follow_up(scene: Scene, rng: random.Random, attribute: str) -> Pair:
    """Return "And the star?" after a question about an attribute, and its answer.

    attribute: "colour", "form", "size" or "place".
    """
    shape = rng.choice(scene.shapes)
    if attribute != "form" and sum(s.form == shape.form for s in scene.shapes) == 1 and rng.random() < 0.6:
        name = f"the {shape.form}"
    elif attribute in ("size", "place"):
        name = f"the {_pair(shape)}"
    else:
        name = f"the shape {AT[shape.place]}"
    return f"And {name}?", getattr(shape, attribute)
