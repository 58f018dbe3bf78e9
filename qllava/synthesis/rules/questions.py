"""Questions whose answers follow from an image's annotation; each is about a different fact.

    questions(view, rng)   {"presence": [Question("Is there a dog?", "yes", "Yes, ...")],
                            "count": [...], "place": [...], ...}

Conditions of each kind of question:

    presence      every category that is there; categories that are absent only if the boxes are complete
    said          things that two captions assert and no box shows
    count         no crowd, and the boxes agree with every caption or are complete
    several       categories with two or more boxes or a crowd whose number is not settled
    outermost     a settled number of things, one of which is clearly on one side of all others
    place         a thing that is known to be the only one of its name and is clearly in one ninth of the image
    half          a thing that is entirely in one half of the image; the answer is always yes
    colour, form, size   categories that name it ("large red circle")
    relation      two things with names of their own that are clearly apart
    comparison    two such things, one of which has a box of at least twice the area
    share         one such thing whose box is clearly less than half of the image
    summary       no condition but a sound caption; the answer is one of them
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations

from qllava.synthesis.rules.view import AT, GAP, LARGER, Thing, View
from qllava.synthesis.words import (
    COLOURS,
    KINDS,
    article,
    capital,
    counted,
    is_plural,
    plural,
    sentence,
    verb,
)


@dataclass(frozen=True)
class Question:
    """A question with one correct answer."""

    text: str
    """The question."""
    brief: str
    """The answer in a word or two."""
    answer: str
    """The answer as a sentence."""


def questions(view: View, rng: random.Random) -> dict[str, list[Question]]:
    """Return every question that an image allows, by kind, in a random order; no fact is asked twice."""
    return {name: rng.sample(found, len(found)) for name, ask in _ASK.items() if (found := list(ask(view, rng)))}


def _presence(view: View, rng: random.Random) -> Iterator[Question]:
    """Yield a question with "yes" for each thing; if the boxes are complete, up to as many hard ones with "no"."""
    present = sorted({thing.phrase for thing in view.things} | view.crowds)
    for phrase in present:
        yield _is_there(rng, phrase, True)
    if not view.complete:
        return
    colours = _colours(view.things)
    nouns = {thing.noun for thing in view.things} | {rng.choice(KINDS[kind]) for kind in _kinds(view)}
    named = (
        {f"{colour} {noun}" for colour in (*colours, *rng.sample(_palette(view), 1)) for noun in nouns}
        if colours
        else nouns
    )
    absent = sorted(named - set(present) - view.by_noun.keys())
    for phrase in rng.sample(absent, min(len(absent), len(present))):
        yield _is_there(rng, phrase, False)


def _colours(things: list[Thing]) -> set[str]:
    """Return the colours of things; none if the colour of one is unknown, because it might be any."""
    colours = {thing.colour for thing in things}
    return {colour for colour in colours if colour and None not in colours}


def _kinds(view: View) -> list[str]:
    """Return the kinds of things; none if the kind of one is unknown, because a puppy might be a dog."""
    kinds = {thing.kind for thing in view.things}
    return sorted(kind for kind in kinds if kind and None not in kinds)


def _palette(view: View) -> tuple[str, ...]:
    """Return the colours for questions about absent things: six for a drawing of shapes, all for a photograph."""
    return COLOURS[:6] if all(thing.kind == "shape" for thing in view.things) else COLOURS


def _is_there(rng: random.Random, phrase: str, there: bool) -> Question:
    what, is_ = article(phrase), verb(phrase)
    text = rng.choice(
        (
            f"{capital(is_)} there {what}?",
            f"{capital(is_)} there {what} in the picture?",
            f"Can you see {what}?",
        )
    )
    answer = f"Yes, there {is_} {what}." if there else f"No, there {is_} no {phrase}."
    return Question(text, "yes" if there else "no", answer)


def _said(view: View, rng: random.Random) -> Iterator[Question]:
    if not view.complete:
        yield from (_is_there(rng, phrase, True) for phrase in view.agreed_things())


def _count(view: View, rng: random.Random) -> Iterator[Question]:
    nouns = set(view.by_noun)
    if view.complete:
        nouns |= {rng.choice(KINDS[kind]) for kind in _kinds(view)}
        for kind in _kinds(view):
            of_kind = [thing for thing in view.things if thing.kind == kind]
            yield _how_many(rng, kind, len(of_kind))
            colours = _colours(of_kind)
            for colour in sorted(colours | {rng.choice(_palette(view))} if colours else ()):
                yield _how_many(rng, f"{colour} {kind}", sum(thing.colour == colour for thing in of_kind))
    for noun in sorted(nouns):
        if (value := view.count(noun)) is not None:
            yield _how_many(rng, noun, value)


def _how_many(rng: random.Random, noun: str, value: int) -> Question:
    many = plural(noun)
    text = rng.choice(
        (f"How many {many} are there?", f"How many {many} are in the picture?", f"How many {many} do you see?")
    )
    return Question(text, str(value), f"There {'is' if value == 1 else 'are'} {counted(value, noun)}.")


def _several(view: View, rng: random.Random) -> Iterator[Question]:
    for noun in view.more_than_one():
        text = rng.choice((f"Is there more than one {noun}?", f"Can you see more than one {noun}?"))
        yield Question(text, "yes", f"Yes, there is more than one {noun}.")


def _outermost(view: View, rng: random.Random) -> Iterator[Question]:
    """Ask on which side the outermost thing is; not if there is one on the left and one on the right."""
    for noun, things in view.by_noun.items():
        if view.complete or view.count(noun) is None or len(things) < 3:
            continue
        clear, near = (_ends(view, things, gap) for gap in (GAP, 0.0))
        if clear == near and len(clear) == 1:
            (side,) = clear
            others = f"all the other {plural(noun)}"
            text = f"One {noun} is clearly apart from {others}: on which side of them, left or right?"
            yield Question(text, side, f"One {noun} is on the {side} of {others}.")


def _ends(view: View, things: list[Thing], gap: float) -> set[str]:
    """Return the sides on which one thing is at least `gap` away from all others."""
    return {
        side
        for thing in things
        for side in ("left", "right")
        if all(view.apart(thing, other, gap).get("x") == f"{side} of" for other in things if other is not thing)
    }


def _named(view: View, rng: random.Random, *without: str) -> Iterator[tuple[Thing, str]]:
    """Yield every thing that has an unambiguous name, with one of its names."""
    for thing in view.things:
        if names := view.names(thing, frozenset(without)):
            yield thing, rng.choice(names)


def _place(view: View, rng: random.Random) -> Iterator[Question]:
    for thing, name in _named(view, rng, "place"):
        if place := view.place(thing):
            text = rng.choice(
                (f"Where is {name}?", f"Where in the picture is {name}?", f"In which part of the picture is {name}?")
            )
            yield Question(text, place, f"{capital(name)} is {AT[place]}.")


def _half(view: View, rng: random.Random) -> Iterator[Question]:
    """Ask also about categories with several things: that one of them is in the half is certain."""
    if view.complete:
        return
    for noun, things in view.by_noun.items():
        halves = {
            half
            for x1, y1, x2, y2 in (thing.bbox for thing in things)
            for half, inside in (("left", x2 <= 0.5), ("right", x1 >= 0.5), ("upper", y2 <= 0.5), ("lower", y1 >= 0.5))
            if inside and not is_plural(noun)
        }
        for half in sorted(halves):
            what = f"{article(noun)} in the {half} half of the picture"
            text = rng.choice((f"Is there {what}?", f"Do you see {what}?"))
            yield Question(text, "yes", f"Yes, there is {what}.")


def _colour(view: View, rng: random.Random) -> Iterator[Question]:
    for thing, name in _named(view, rng, "colour"):
        if thing.colour:
            text = rng.choice((f"What colour is {name}?", f"Which colour does {name} have?"))
            yield Question(text, thing.colour, f"{capital(name)} is {thing.colour}.")


def _form(view: View, rng: random.Random) -> Iterator[Question]:
    for thing, name in _named(view, rng, "noun"):
        kinds = (
            (f"What form is {name}?", f"What form does {name} have?")
            if thing.kind == "shape"
            else (f"What is {name}?",)
        )
        yield Question(rng.choice(kinds), thing.noun, f"It is {article(thing.noun)}.")


def _size(view: View, rng: random.Random) -> Iterator[Question]:
    for thing, name in _named(view, rng):
        if thing.size:
            text = rng.choice((f"What size is {name}?", f"How large is {name}?"))
            yield Question(text, thing.size, f"{capital(name)} is {thing.size}.")


_OTHER_WAY = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def _relation(view: View, rng: random.Random) -> Iterator[Question]:
    # A context that is not known to be complete belongs to a photograph, where "above" could mean "on top of".
    where = "" if view.complete else " in the picture"
    for (a, first), (b, second) in combinations(_named(view, rng, "place"), 2):
        for is_ in view.apart(a, b).values():
            one, other, really = (first, second, is_) if rng.random() < 0.5 else (second, first, _OTHER_WAY[is_])
            asked = rng.choice((really, _OTHER_WAY[really]))
            brief = "yes" if asked == really else "no"
            answer = f"{capital(brief)}, {one} is {really} {other}{where}."
            yield Question(f"Is {one} {asked} {other}{where}?", brief, answer)


def _comparison(view: View, rng: random.Random) -> Iterator[Question]:
    for (a, first), (b, second) in combinations(_named(view, rng, "place"), 2):
        if max(a.area, b.area) < LARGER * min(a.area, b.area):
            continue
        one, other = (first, second) if rng.random() < 0.5 else (second, first)
        larger = (a.area > b.area) == (one == first)
        says = rng.random() < 0.5
        # Without sizes in the annotation only the areas in the image can be compared: distances are unknown.
        if a.size and b.size:
            word, really = ("larger" if larger == says else "smaller"), ("larger" if larger else "smaller")
            text, said = f"Is {one} {word} than {other}?", f"{one} is {really} than {other}"
        else:
            word, really = ("more" if larger == says else "less"), ("more" if larger else "less")
            text = f"Does {one} take up {word} of the picture than {other}?"
            said = f"{one} takes up {really} of the picture than {other}"
        brief = "yes" if says else "no"
        yield Question(text, brief, f"{capital(brief)}, {said}.")


def _share(view: View, rng: random.Random) -> Iterator[Question]:
    """Ask only about small boxes: a thing is at most as large as its box, and may be smaller."""
    if view.complete:
        return
    for thing, name in _named(view, rng):
        if thing.area < 0.45:
            word, brief = rng.choice((("less", "yes"), ("more", "no")))
            text = f"Does {name} take up {word} than half of the picture?"
            answer = f"{capital(brief)}, {name} takes up less than half of the picture."
            yield Question(text, brief, answer)


def _summary(view: View, rng: random.Random) -> Iterator[Question]:
    said = sentence(rng.choice(view.sound_captions or view.captions))
    text = rng.choice(
        ("What is going on in the picture?", "What does the picture show?", "How would you sum up the scene?")
    )
    if not view.complete and view.sound_captions:
        yield Question(text, said, said)


_ASK: dict[str, Callable[[View, random.Random], Iterator[Question]]] = {
    "presence": _presence,
    "count": _count,
    "several": _several,
    "outermost": _outermost,
    "place": _place,
    "relation": _relation,
    "comparison": _comparison,
    "colour": _colour,
    "form": _form,
    "size": _size,
    "half": _half,
    "share": _share,
    "said": _said,
    "summary": _summary,
}
