"""What may be said of a picture by its captions and boxes, and what may not.

    view = View(context)
    view.count("dog")       2, or None where the annotation does not settle it
    view.place(thing)       "top left", or None where it is a matter of taste
    view.names(thing)       ["the dog"]: names that mean this one thing; none where another might be meant
    view.apart(a, b)        where a clearly lies, seen from b: {"left of", "above"}

COCO's boxes are not all that there is to see: crowds are left out, small things are missed, and lists may be cut. So
nothing is ever absent there, and a number is only known where the captions do not speak against it. Where a context is
`complete` (nano's scenes) both are known.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass

from qllava.synthesis.contexts import Context
from qllava.synthesis.words import KIND_OF, NOT_COUNTED, OTHER_NAMES, SORTS, attributes, plural, read_number

AT = {
    "top left": "at the top left", "top": "at the top", "top right": "at the top right",
    "left": "on the left", "centre": "in the centre", "right": "on the right",
    "bottom left": "at the bottom left", "bottom": "at the bottom", "bottom right": "at the bottom right",
}  # fmt: skip
"""The nine places, as thirds of width and height, and how a sentence says them."""
MOST = 9
"""COCO's annotators marked about ten of a category and drew a crowd around the rest: ten may be more."""
LARGER = 2.0
"""How many times the area of another a box must have to be called larger."""
_SHY = 0.04
"""How far from a line between thirds the middle of a thing must lie to be on one side of it."""
_WIDE = 0.6
"""What reaches over more of the width or height is in no third of it."""
GAP = 0.02
"""How far apart two things must end and begin to lie clearly beside each other."""
_VAGUE = frozenset({
    "several", "many", "few", "group", "herd", "flock", "lots", "lot", "some", "row", "rows", "bunch", "number",
    "various", "multiple", "variety", "assortment", "crowd", "different", "other", "others", "bundle", "stack",
    "pile", "dozens",
})  # fmt: skip
_BREAKS = frozenset({
    "and", "or", "with", "in", "on", "at", "by", "near", "next", "to", "from", "behind", "under", "over", "while",
    "who", "that", "is", "are",
})  # fmt: skip
_NO_THINGS = frozenset({
    "couple", "group", "number", "lot", "row", "pair", "bunch", "image", "picture", "view", "close", "photo",
    "photograph", "variety", "set", "few", "herd", "shot", "scene", "trick", "way", "time", "day", "side", "top",
    "front", "middle", "bottom", "back", "background", "foreground", "part", "piece", "type", "kind", "selfie",
    "display", "large", "small", "little", "old", "young", "big", "white", "black", "red", "blue", "green", "brown",
})  # fmt: skip
_END = frozenset({
    "of", "in", "on", "at", "by", "with", "and", "or", "near", "next", "to", "from", "behind", "under", "over",
    "above", "below", "is", "are", "was", "while", "who", "that", "which", "inside", "outside", "into", "onto",
    "for", "up", "down", "beside", "between", "during", "across", "through", "along", "around", "off", "as",
})  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One box, and what its category says."""

    noun: str
    bbox: tuple[float, float, float, float]
    size: str | None = None
    colour: str | None = None

    @property
    def area(self) -> float:
        """Share of the picture that its box takes."""
        return (self.bbox[2] - self.bbox[0]) * (self.bbox[3] - self.bbox[1])

    @property
    def kind(self) -> str | None:
        """The word above its category, where there is one."""
        return KIND_OF.get(self.noun)

    @property
    def phrase(self) -> str:
        """Colour, if any, and noun."""
        return f"{self.colour} {self.noun}" if self.colour else self.noun


class View:
    """A context, asked for what follows from it."""

    def __init__(self, context: Context) -> None:
        self.complete = context.complete
        self.captions = context.captions
        self.things = [
            Thing(noun, box.bbox, size, colour)
            for box in context.boxes
            for size, colour, noun in [attributes(box.category)]
        ]
        self.by_noun: dict[str, list[Thing]] = defaultdict(list)
        for thing in self.things:
            self.by_noun[thing.noun].append(thing)
        self._words = [re.findall(r"[a-z]+|\d+|[^\w\s']", caption.lower()) for caption in context.captions]
        self._counts = {noun: self._settled(noun) for noun in self.by_noun}

    def count(self, noun: str) -> int | None:
        """How many of a category there are; None where the annotation does not settle it."""
        return self._counts.get(noun, 0 if self.complete else None)

    def _settled(self, noun: str) -> int | None:
        found = len(self.by_noun[noun])
        if self.complete:
            return found
        if noun in NOT_COUNTED or found > MOST:
            return None
        same, some = (noun, *OTHER_NAMES.get(noun, ())), SORTS.get(noun, ())
        agreed = all(
            self._agrees(words, name, found, exactly)
            for words in self._words
            for names, exactly in ((same, True), (some, False))
            for name in names
        )
        sorts = max(sum(bool({name, plural(name)} & set(words)) for name in some) for words in self._words)
        return found if agreed and sorts <= found else None

    @staticmethod
    def _agrees(words: list[str], name: str, found: int, exactly: bool) -> bool:
        """Whether a caption's words allow so many; `exactly`: its number means all of them, otherwise at least some."""
        length, many = len(name.split()), plural(name).split()
        for at in range(len(words) - length + 1):
            here = words[at : at + length]
            if here != many and here != name.split():
                continue
            said = None
            for before in reversed(words[max(0, at - 4) : at]):
                if before in _BREAKS or not before.isalnum():
                    break
                if before in _VAGUE and found < 3:
                    return False
                said = said or read_number(before)
            least = 2 if here == many and many != name.split() else 1
            if said is not None and (found < said or (exactly and said != found and said > 1)):
                return False
            # "a giraffe" does not say that it is the only one, "another" says that it is not.
            if found < least or (found < 2 and at and words[at - 1] == "another"):
                return False
        return True

    def place(self, thing: Thing) -> str | None:
        """Which of the nine places a thing is in; None where it lies near a line or reaches over most of it."""
        x1, y1, x2, y2 = thing.bbox
        across, down = _third(x1, x2), _third(y1, y2)
        if across is None or down is None:
            return None
        return list(AT)[3 * down + across]

    def names(self, thing: Thing, without: frozenset[str] = frozenset()) -> list[str]:
        """Names that mean exactly this thing and mention none of `without` (colour, noun, place).

        One that is not known to be the only one of its category has none, unless the boxes are complete.
        """
        out = []
        if "noun" not in without and self.count(thing.noun) == 1:
            out.append(f"the {thing.noun}")
        if not self.complete:
            return out
        has_colour, others = "colour" not in without and thing.colour, [t for t in self.things if t is not thing]
        # What has no colour in the annotation, or no kind in our table, might have this one.
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
        """On which axes two things clearly lie beside each other, and where `a` then is: {"x": "left of"}."""
        out = {}
        for axis, low, before, after in (("x", 0, "left of", "right of"), ("y", 1, "above", "below")):
            if a.bbox[low + 2] + gap <= b.bbox[low]:
                out[axis] = before
            elif b.bbox[low + 2] + gap <= a.bbox[low]:
                out[axis] = after
        return out

    def agreed_things(self) -> list[str]:
        """Things that at least two captions name after an article, and no box: "street sign"."""
        seen: Counter[str] = Counter()
        for words in self._words:
            seen.update({phrase for phrase in _phrases(words) if phrase not in self.by_noun})
        agreed = [phrase for phrase, times in seen.items() if times >= 2]
        known = {word for noun in self.by_noun for word in (noun, *OTHER_NAMES.get(noun, ()), *SORTS.get(noun, ()))}
        last = {phrase.split()[-1] for phrase in known}
        longest = [p for p in agreed if not any(other != p and other.endswith(f" {p}") for other in agreed)]
        return sorted(phrase for phrase in longest if phrase.split()[-1] not in last)


def _third(low: float, high: float) -> int | None:
    """0, 1 or 2 for the third that the middle of low..high clearly lies in."""
    middle = (low + high) / 2
    if high - low > _WIDE or min(abs(middle - 1 / 3), abs(middle - 2 / 3)) < _SHY:
        return None
    return int(middle * 3)


def _phrases(words: list[str]) -> set[str]:
    """What stands after "a" or "an" up to a word that ends it, and its last one or two words alone."""
    out: set[str] = set()
    for at, word in enumerate(words):
        if word not in ("a", "an"):
            continue
        phrase: list[str] = []
        for following in [*words[at + 1 : at + 5], *([","] if at + 5 > len(words) else [])]:
            if following in _END or not following.isalpha() or re.search("ing$|..ed$", following):
                break
            phrase.append(following)
        else:
            phrase = []  # nothing ended it, so it is not known where the thing ends
        if phrase and not phrase[-1].endswith("s") and phrase[-1] not in _NO_THINGS:
            out.update(" ".join(phrase[-length:]) for length in (1, 2) if length <= len(phrase))
    return out
