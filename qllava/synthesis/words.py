"""The little English that rules need: plurals, numbers, kinds, other names of a thing, and what a category says.

attributes("large red circle")    ("large", "red", "circle")
plural("potted plant")            "potted plants"
number(3)                         "three"
"""

from __future__ import annotations

import re
from collections.abc import Sequence

SIZES = ("small", "medium", "large")
COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey",
)  # fmt: skip
KINDS = {
    "animal": ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"),
    "vehicle": ("bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat"),
    "shape": ("circle", "square", "triangle", "cross", "star", "ring"),
}
"""Words that stand above several categories; the first two are COCO's."""
KIND_OF = {noun: kind for kind, nouns in KINDS.items() for noun in nouns}

ONLY_PLURAL = frozenset({"skis", "scissors"})
"""One box of these is a pair, or half of one: they are there or not, and are never counted."""
NOT_COUNTED = ONLY_PLURAL | {"broccoli", "food", "hair", "water", "grass", "sand", "snow"}
OTHER_NAMES = {
    "person": ("human",),
    "donut": ("doughnut",),
    "bicycle": ("bike",),
    "motorcycle": ("motorbike",),
    "airplane": ("plane", "aeroplane"),
    "couch": ("sofa",),
    "cell phone": ("cellphone", "phone"),
    "tv": ("television",),
    "laptop": ("laptop computer",),
    "remote": ("controller", "remote control"),
    "potted plant": ("plant",),
    "dining table": ("table",),
}
"""What a caption may call the same thing: a number with it is a number of that thing."""
SORTS = {
    "person": (
        "man", "woman", "boy", "girl", "kid", "child", "guy", "lady", "skier", "player", "rider", "worker",
        "skateboarder", "surfer", "baby",
    ),
    "suitcase": ("bag",),
    "bird": ("duck", "goose", "gull", "seagull", "pigeon"),
    "dog": ("puppy",),
    "cat": ("kitten",),
}  # fmt: skip
"""What some of a thing may be called: a number with it is a number of at least so many."""

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_IRREGULAR = {
    "person": "people", "man": "men", "woman": "women", "child": "children", "knife": "knives", "mouse": "mice",
    "sheep": "sheep", "goose": "geese", "foot": "feet", "tooth": "teeth", "leaf": "leaves", "shelf": "shelves",
    "skis": "skis", "scissors": "scissors", "fish": "fish", "deer": "deer",
}  # fmt: skip


def attributes(category: str) -> tuple[str | None, str | None, str]:
    """Size, colour and noun of a category: what it is always ends it ("orange" is a fruit, "orange ring" is not)."""
    words = category.lower().split()
    size = words.pop(0) if len(words) > 1 and words[0] in SIZES else None
    colour = words.pop(0) if len(words) > 1 and words[0] in COLOURS else None
    return size, colour, " ".join(words)


def plural(noun: str) -> str:
    """The plural of a noun; of several words the last one changes."""
    before, _, last = noun.rpartition(" ")
    if last in _IRREGULAR:
        many = _IRREGULAR[last]
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        many = f"{last}es"
    elif re.search(r"[^aeiou]y$", last):
        many = f"{last[:-1]}ies"
    else:
        many = f"{last}s"
    return f"{before} {many}".strip()


def article(words: str) -> str:
    """`words` with "a" or "an" before them; what has no singular goes without."""
    if words.split()[-1] in NOT_COUNTED:
        return words
    return f"an {words}" if words[0] in "aeiou" and not words.startswith("uni") else f"a {words}"


def number(value: int) -> str:
    """A number as a word, from zero ("no") to twelve, and as digits above."""
    return _NUMBERS[value] if value < len(_NUMBERS) else str(value)


def counted(value: int, noun: str) -> str:
    """A number of things: "one dog", "three dogs", "no dogs"."""
    return f"{number(value)} {noun if value == 1 else plural(noun)}"


def read_number(word: str) -> int | None:
    """The number that a word of a caption means: "three", "3", "a couple", "a pair"; None for others."""
    if word.isascii() and word.isdigit():
        return int(word)
    return {"couple": 2, "pair": 2, "both": 2}.get(word, _NUMBERS.index(word) if word in _NUMBERS[1:] else None)


def listed(words: Sequence[str]) -> str:
    """ "a cat", "a cat and a dog", "a cat, a dog and a bird"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def sentence(text: str) -> str:
    """A caption as a sentence: one blank between words, a capital letter at its start and a full stop at its end."""
    text = " ".join(text.split())
    text = text.lower() if text.isupper() else text
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."
