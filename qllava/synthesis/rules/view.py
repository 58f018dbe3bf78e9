"""Facts about an image that follow from its captions and boxes.

    view = View(context)
    view.count("dog")       2, or None where the annotation does not settle it
    view.place(thing)       "top left", or None where it is ambiguous
    view.names(thing)       ["the dog"]: names that refer to this thing only; empty where another might be meant
    view.apart(a, b)        where a clearly is, relative to b, by axis: {"x": "left of", "y": "above"}

COCO's boxes do not show everything in an image: a crowd is one box, small things are missed, and lists may be
truncated. So nothing is treated as absent, and a number is known only without a crowd and if the captions do not
contradict it (`mentions`). A thing without a box counts as present only if two captions assert it (`asserted`). If a
context is `complete` (nano's scenes), both absence and number are known.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from qllava.data.contexts import Context
from qllava.synthesis.objects import unsupported
from qllava.synthesis.phrases import simple_phrases
from qllava.synthesis.rules.asserted import asserted, denied, lacks_article
from qllava.synthesis.rules.mentions import disputed, in_pieces, speaks_against, wider_speaks_against
from qllava.synthesis.rules.nouns import OTHER_NAMES, SORTS
from qllava.synthesis.words import KIND_OF, attributes, is_counted, plural, well_formed

AT = {
    "top left": "at the top left", "top": "at the top", "top right": "at the top right",
    "left": "on the left", "centre": "in the centre", "right": "on the right",
    "bottom left": "at the bottom left", "bottom": "at the bottom", "bottom right": "at the bottom right",
}  # fmt: skip
"""The nine places (thirds of width and height), each with its phrase in a sentence."""
MOST = 9
"""Largest settled number of one category. COCO's annotators marked about ten and drew a crowd around the rest."""
LARGER = 2.0
"""Smallest ratio of two boxes' areas at which one is called larger."""
_SHY = 0.04
"""Smallest distance between a thing's centre and a line between thirds, as a share of the width or height."""
_WIDE = 0.6
"""Largest extent, as a share of the width or height, of a thing that is in one third of it."""
GAP = 0.02
"""Smallest gap between two things that are clearly apart, as a share of the width or height."""


@dataclass(frozen=True)
class Thing:
    """One box, with the attributes that its category names."""

    noun: str
    """Noun of the category."""
    bbox: tuple[float, float, float, float]
    """Left, top, right and bottom edge, as shares of the image's width and height."""
    size: str | None = None
    """Size that the category names, if any."""
    colour: str | None = None
    """Colour that the category names, if any."""

    @property
    def area(self) -> float:
        """Share of the image's area that the box covers."""
        return (self.bbox[2] - self.bbox[0]) * (self.bbox[3] - self.bbox[1])

    @property
    def kind(self) -> str | None:
        """Broader term of the category, such as "animal"; None if there is none."""
        return KIND_OF.get(self.noun)

    @property
    def phrase(self) -> str:
        """Noun, preceded by the colour if there is one."""
        return f"{self.colour} {self.noun}" if self.colour else self.noun


class View:
    """Facts that follow from a context."""

    def __init__(self, context: Context) -> None:
        self.crowds = frozenset(attributes(category)[2] for category in context.crowds)
        # If one box holds many things, the boxes do not show what else is in the image.
        self.complete = context.complete and not self.crowds
        self.captions = context.captions
        self.things = [
            Thing(noun, box.bbox, size, colour)
            for box in context.boxes
            for size, colour, noun in [attributes(box.category)]
        ]
        self.by_noun: dict[str, list[Thing]] = defaultdict(list)
        for thing in self.things:
            self.by_noun[thing.noun].append(thing)
        found = {noun: len(things) for noun, things in self.by_noun.items()}
        unsure = set() if self.complete else wider_speaks_against(self.captions, found)
        self._counts = {noun: None if noun in unsure else self._settled(noun, found[noun]) for noun in found}
        self._categories = context.categories

    def count(self, noun: str) -> int | None:
        """Return how many things of a category there are; None if the annotation does not settle it."""
        return self._counts.get(noun, 0 if self.complete else None)

    def _settled(self, noun: str, found: int) -> int | None:
        if noun in self.crowds or not is_counted(noun):
            return None
        if self.complete:
            return found
        if found > MOST or in_pieces(self.captions, noun) or speaks_against(self.captions, noun, found):
            return None
        return found

    def more_than_one(self) -> list[str]:
        """Return the categories that have several things but no settled number."""
        several = {
            noun
            for noun, things in self.by_noun.items()
            if len(things) > 1 and not self.count(noun) and not in_pieces(self.captions, noun)
        }
        return sorted(noun for noun in several | self.crowds if is_counted(noun))

    @cached_property
    def sound_captions(self) -> list[str]:
        """Well-formed captions that nothing contradicts: the half that the other captions confirm most."""
        if self.complete:
            return list(self.captions)
        sound: list[tuple[float, str]] = []
        for caption in self.captions:
            others = [other for other in self.captions if other is not caption]
            alone = bool(others) and unsupported(caption, others, self._categories)
            digits = [set(re.findall(r"\d+", one)) for one in (caption, " ".join(others))]
            wrong = any(
                speaks_against([caption], noun, len(things)) or disputed(caption, others, noun)
                for noun, things in self.by_noun.items()
                if noun not in self.crowds and is_counted(noun) and len(things) <= MOST
            )
            wrong = wrong or bool(digits[1] and digits[0] - digits[1])
            if well_formed(caption) and not lacks_article(caption) and not alone and not wrong:
                sound.append((_shared(caption, others), caption))
        # What no other caption says is more often wrong or misspelled.
        sound.sort(key=lambda one: -one[0])
        return [caption for _, caption in sound[: max(1, len(sound) // 2)]]

    def place(self, thing: Thing) -> str | None:
        """Return which of the nine places a thing is in; None if it is near a line or covers most of an axis."""
        x1, y1, x2, y2 = thing.bbox
        across, down = _third(x1, x2), _third(y1, y2)
        if across is None or down is None:
            return None
        return list(AT)[3 * down + across]

    def names(self, thing: Thing, without: frozenset[str] = frozenset()) -> list[str]:
        """Return names that refer to exactly this thing.

        A thing that is not known to be the only one of its category has no name, unless the boxes are complete.

        Args:
            thing: A thing of this view.
            without: What the names must not mention: "colour", "noun", "place".
        """
        out: list[str] = []
        if not is_counted(thing.noun):
            return out
        if "noun" not in without and self.count(thing.noun) == 1:
            out.append(f"the {thing.noun}")
        if not self.complete:
            return out
        has_colour, others = "colour" not in without and thing.colour, [t for t in self.things if t is not thing]
        # A thing without a colour in the annotation, or without a kind in our table, might have this one.
        tinted = [t for t in others if t.colour in (thing.colour, None)]
        if has_colour and "noun" not in without and all(t.noun != thing.noun for t in tinted):
            out.append(f"the {thing.phrase}")
        alike = [t for t in others if t.kind in (thing.kind, None)]
        if thing.kind and has_colour and not any(t in alike for t in tinted):
            out.append(f"the {thing.colour} {thing.kind}")
        place = self.place(thing)
        if thing.kind and place and "place" not in without and all(self.place(t) not in (place, None) for t in alike):
            out.append(f"the {thing.kind} {AT[place]}")
        return out

    def apart(self, a: Thing, b: Thing, gap: float = GAP) -> dict[str, str]:
        """Return the axes on which two things are clearly apart, and the side of `a` on each: {"x": "left of"}."""
        out = {}
        for axis, low, before, after in (("x", 0, "left of", "right of"), ("y", 1, "above", "below")):
            if a.bbox[low + 2] + gap <= b.bbox[low]:
                out[axis] = before
            elif b.bbox[low + 2] + gap <= a.bbox[low]:
                out[axis] = after
        return out

    def agreed_things(self) -> list[str]:
        """Return the things that two captions assert, none denies and no box shows: "street sign", "trees"."""
        said = [asserted(caption) for caption in self.captions]
        refused = set().union(*map(denied, self.captions))
        agreed = [name for name, captions in Counter(chain(*said)).items() if captions >= 2 and name not in refused]
        boxed = {*self.by_noun, *self.crowds}
        known = {word for noun in boxed for word in (noun, *OTHER_NAMES.get(noun, ()), *SORTS.get(noun, ()))}
        last = {name.split()[-1] for name in known}
        # A bathroom is a room: the longer name implies the shorter one.
        longest = [name for name in agreed if not any(other != name and other.endswith(name) for other in agreed)]
        return sorted(
            plural(name) if all(one.get(name, True) for one in said) else name
            for name in longest
            if name.split()[-1] not in last
        )


def _shared(caption: str, others: Sequence[str]) -> float:
    """Return the share of a caption's words that other captions also have; only words in phrases count."""
    said = {word for phrase in simple_phrases(" ".join(others)) for word in phrase.split()}
    said |= {plural(word) for word in said}
    words = [word for phrase in simple_phrases(caption) for word in phrase.split()]
    return sum(word in said or plural(word) in said for word in words) / max(len(words), 1)


def _third(low: float, high: float) -> int | None:
    """Return the third (0, 1 or 2) that clearly contains the middle of low..high; None if none does."""
    middle = (low + high) / 2
    if high - low > _WIDE or min(abs(middle - 1 / 3), abs(middle - 2 / 3)) < _SHY:
        return None
    return int(middle * 3)
