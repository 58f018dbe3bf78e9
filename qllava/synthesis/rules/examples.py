"""Examples of instruction data derived from captions and boxes by rules.

    write(context)   [{"id": "000000296284-conversation", "image", "type", "conversations": [...]}, ...]

    conversation   several questions, each about a different fact
    detail         a description: a caption, then what the boxes add to it
    reasoning      a question that takes several steps (count and compare, add, order); the steps come first
    naive          a question from a list and a caption, for comparison

If too little is known of an image for a type, the image has no example of that type. Every answer agrees with the
annotation; `view` decides what is too uncertain to be asked. The same context, seed and types give the same examples,
in any order and on any machine. With `brief`, answers in conversations have a word or two, as evaluations expect.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import combinations, permutations
from typing import Any

from qllava.conversation import ask
from qllava.data.contexts import Context
from qllava.synthesis.prompting import DEFAULT_TYPES, Prompts
from qllava.synthesis.rules.questions import Question, questions
from qllava.synthesis.rules.view import AT, LARGER, Thing, View
from qllava.synthesis.words import article, capital, counted, listed, number, plural, sentence, verb

TURNS = 10
"""Default for the largest number of questions in a conversation."""


def write(
    context: Context, types: Sequence[str] = DEFAULT_TYPES, *, seed: int = 0, brief: bool = False, turns: int = TURNS
) -> list[dict[str, Any]]:
    """Return the examples of an image in LLaVA's format, one of each type that its annotation allows.

    Args:
        context: Captions and boxes of the image.
        types: Response types to write.
        seed: Seed of the random choices.
        brief: Whether the answers of a conversation have only a word or two.
        turns: Largest number of questions in a conversation.
    """
    view, rows = View(context), []
    for type_ in types:
        rng = random.Random(f"{seed} {type_} {context.id}")
        if type_ == "conversation":
            pairs = conversation(view, rng, brief=brief, turns=turns)
        elif type_ == "detail":
            said = detail(view, rng)
            pairs = [(Prompts().question("detail", context), said)] if said else []
        elif type_ == "reasoning":
            found = list(reasons(view))
            pairs = [rng.choice(found)] if found else []
        elif type_ == "naive":
            pairs = [(Prompts().question("naive", context), sentence(rng.choice(context.captions)))]
        else:
            raise ValueError(f"{type_!r} is not a response type")
        if pairs:
            rows.append(_row(context, type_, pairs))
    return rows


def _row(context: Context, type_: str, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    said = [
        {"from": side, "value": value}
        for at, (question, answer) in enumerate(pairs)
        for side, value in (("human", question if at else ask(question)), ("gpt", answer))
    ]
    return {"id": f"{context.id}-{type_}", "image": context.image, "type": type_, "conversations": said}


def conversation(view: View, rng: random.Random, *, brief: bool = False, turns: int = TURNS) -> list[tuple[str, str]]:
    """Return questions and answers about distinct facts; the kinds of questions alternate, so that none dominates."""
    asked = questions(view, rng)
    if brief:
        asked.pop("summary", None)
    sorts = rng.sample(sorted(asked), len(asked))
    chosen: list[Question] = []
    while len(chosen) < turns and any(asked.values()):
        for sort in sorts:
            if asked[sort] and len(chosen) < turns:
                chosen.append(asked[sort].pop())
    return [(one.text, one.brief if brief else one.answer) for one in chosen]


def detail(view: View, rng: random.Random) -> str:
    """Return a description: the longest sound caption, then numbers, places and relations of things; may be empty."""
    if view.complete:
        said = [f"{article(f'{t.size} {t.phrase}' if t.size else t.phrase)}{_at(view, t)}" for t in view.things]
        return f"There {verb(view.things[0].noun)} {listed(said)}." if said else "There is nothing."
    if not view.sound_captions:
        return ""
    parts = [sentence(max(view.sound_captions, key=len))]
    for noun, things in view.by_noun.items():
        known = view.count(noun)
        if known == 1 and (place := view.place(things[0])):
            parts.append(f"The {noun} is {AT[place]}.")
        elif known is not None and known > 1:
            parts.append(f"There are {counted(known, noun)}.")
        elif len(things) > 2 and noun in view.more_than_one():
            parts.append(f"There are several {plural(noun)}.")
    named = [(f"the {noun}", things[0]) for noun, things in view.by_noun.items() if view.count(noun) == 1]
    pairs = [(a, b) for a, b in combinations(named, 2) if view.apart(a[1], b[1])]
    for (first, a), (second, b) in rng.sample(pairs, min(2, len(pairs))):
        parts.append(f"{capital(first)} is {listed(list(view.apart(a, b).values()))} {second} in the picture.")
    return " ".join(parts)


def _at(view: View, thing: Thing) -> str:
    place = view.place(thing)
    return f" {AT[place]}" if place else ""


def reasons(view: View) -> Iterator[tuple[str, str]]:
    """Yield questions that need several steps, with answers that show the steps."""
    counts = {noun: count for noun in view.by_noun if (count := view.count(noun)) is not None}
    for a, b in permutations(counts.items(), 2):
        yield _more(*a, *b)
    for a, b in combinations(counts.items(), 2):
        yield _together(*a, *b)
    named = [(names[0], thing) for thing in view.things if (names := view.names(thing, frozenset({"place"})))]
    for three in combinations(named, 3):
        yield from _first_of(view, three)
    for one, two in combinations(named, 2):
        (smaller, little), (larger, big) = sorted((one, two), key=lambda pair: pair[1].area)
        if big.area >= LARGER * little.area and (place := view.place(big)):
            where = f"{capital(larger)} takes up more of it than {smaller}, and it is {AT[place]}."
            text = f"Which takes up more of the picture, {one[0]} or {two[0]}, and where is it?"
            yield text, f"{where} So it is {larger}, {AT[place]}."


def _more(first: str, a: int, second: str, b: int) -> tuple[str, str]:
    step, brief = f"{capital(number(max(a, b)))} is more than {number(min(a, b))}", "yes" if a > b else "no"
    if a == b:
        step = "That is as many of one as of the other"
    return f"Are there more {plural(first)} than {plural(second)}?", (
        f"{_there_are(first, a, second, b)} {step}, so the answer is {brief}."
    )


def _together(first: str, a: int, second: str, b: int) -> tuple[str, str]:
    adds = f"{capital(number(a))} and {number(b)} make {number(a + b)}"
    return f"How many {plural(first)} and {plural(second)} are there together?", (
        f"{_there_are(first, a, second, b)} {adds}, so the answer is {number(a + b)}."
    )


def _there_are(first: str, a: int, second: str, b: int) -> str:
    return f"There {'is' if a == 1 else 'are'} {counted(a, first)} and {counted(b, second)}."


def _first_of(view: View, three: Sequence[tuple[str, Thing]]) -> Iterator[tuple[str, str]]:
    for word, axis, side in (("furthest to the left", "x", "left of"), ("highest up", "y", "above")):
        for name, thing in three:
            others = [(other, b) for other, b in three if b is not thing]
            if all(view.apart(thing, b).get(axis) == side for _, b in others):
                steps = listed([f"{side} {other}" for other, _ in others])
                text = f"Of {listed([name for name, _ in three])}, which is {word} in the picture?"
                yield text, f"{capital(name)} is {steps}, so it is {name}."
