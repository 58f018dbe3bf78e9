"""Questions whose answers follow from an image's annotation, each about a fact of its own.

    questions(view, rng)   {"presence": [Question("Is there a dog?", "yes", "Yes, ...")],
                            "count": [...], "place": [...], ...}

What is asked of which image:

    presence      of every category; of what is not there only where the boxes are complete
    said          of what two captions say is there and no box shows
    count         without a crowd, where the boxes and every caption agree, or the boxes are complete
    several       of what has two boxes or more or a crowd, where the number is not settled
    outermost     of a settled number of things: on which side of all others one of them clearly lies
    place         of a thing that is known to be the only one of its name and lies clearly in a ninth of the image
    half          of a thing that lies whole in one half of the image; the answer is always yes
    colour, form, size   where the category says it ("large red circle")
    relation      of two such things that lie clearly apart
    comparison    of two such things, one of which has a box of at least twice the area
    share         of one such thing whose box is clearly less than half of the image
    summary       one of the captions
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
    """A question with one right answer."""

    text: str
    brief: str  # the answer in a word or two
    answer: str  # the answer as a sentence


def questions(view: View, rng: random.Random) -> dict[str, list[Question]]:
    """Every question that an image allows, by what is asked, in a random order; no fact comes twice."""
    return {name: rng.sample(found, len(found)) for name, ask in _ASK.items() if (found := list(ask(view, rng)))}


def _presence(view: View, rng: random.Random) -> Iterator[Question]:
    """Yes for what has a box; where boxes are complete, as many noes: hard ones, of a colour or kind that is there."""
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
    """The colours of things; none where one has a colour that is not known, for it might be any."""
    colours = {thing.colour for thing in things}
    return {colour for colour in colours if colour and None not in colours}


def _kinds(view: View) -> list[str]:
    """The kinds of things; none where a category is of no kind that is known, for a puppy might be a dog."""
    kinds = {thing.kind for thing in view.things}
    return sorted(kind for kind in kinds if kind and None not in kinds)


def _palette(view: View) -> tuple[str, ...]:
    """Colours that may be asked for in vain: a drawing of shapes is in those of the rainbow, a photograph in all."""
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
    """Where one lies apart on the left and another on the right, neither is the one that is meant."""
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
    """On which sides a thing lies that is `gap` or more away from all others."""
    return {
        side
        for thing in things
        for side in ("left", "right")
        if all(view.apart(thing, other, gap).get("x") == f"{side} of" for other in things if other is not thing)
    }


def _named(view: View, rng: random.Random, *without: str) -> Iterator[tuple[Thing, str]]:
    """Yield every thing that has a name of its own, with one of its names."""
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
    """For many things of a category too: that one of them is there is certain."""
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
    # A context that is not known to be complete is of a photograph, where "above" alone could mean "on top of".
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
        # Of things that lie at different distances only what they take of the image can be compared.
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
    """A box holds its thing, so what is less than half for the box is so for the thing; more than half is not known."""
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
