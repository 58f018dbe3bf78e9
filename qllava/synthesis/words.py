"""English for the rules: plurals, articles, verbs, numbers, kinds, and the attributes in a category's name.

attributes("large red circle")    ("large", "red", "circle")
plural("potted plant")            "potted plants"
article("skis")                   "skis": a word without a singular, or without a plural, has no article
number(3)                         "three"
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise


def several(text: str) -> tuple[str, ...]:
    """Return the words of a text, in order."""
    return tuple(text.split())


def word_set(text: str) -> frozenset[str]:
    """Return the words of a text as a set."""
    return frozenset(text.split())


SIZES = ("small", "medium", "large")
COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey",
)  # fmt: skip
KINDS = {
    "animal": ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"),
    "vehicle": ("bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat"),
    "shape": ("circle", "square", "triangle", "cross", "star", "ring"),
}
"""Broader terms, each with its categories; the first two are COCO's supercategories."""
KIND_OF = {noun: kind for kind, nouns in KINDS.items() for noun in nouns}

_MASS = word_set(
    """
    broccoli food hair water grass sand snow ice rain mud dirt soil smoke fog sky rice bread meat cheese butter
    fruit pasta corn spinach lettuce cabbage garlic soup salad milk juice coffee tea beer wine sugar salt sauce
    luggage baggage furniture equipment clothing jewelry jewellery silverware cutlery traffic graffiti wood metal
    plastic paper cardboard concrete asphalt pavement gravel stone brick foliage vegetation shrubbery scenery
    money mail trash garbage rubbish hay straw wool fur leather cotton produce popcorn toast bacon ham pork beef
    seafood
    """
)
"""Mass nouns: they have no plural and are never counted."""
_PLURAL_ONLY = word_set("people men women children cattle police mice geese teeth feet oxen livestock")
_SINGULAR_IN_S = word_set("gas lens canvas atlas iris tennis bus christmas pancreas")
_SAME = word_set("sheep fish deer bison moose shrimp aircraft series species")
"""Nouns whose plural equals their singular; they can be counted."""

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_IRREGULAR = {
    "person": "people", "man": "men", "woman": "women", "child": "children", "knife": "knives", "mouse": "mice",
    "goose": "geese", "foot": "feet", "tooth": "teeth", "ox": "oxen", "calf": "calves", "leaf": "leaves",
    "shelf": "shelves", "loaf": "loaves", "scarf": "scarves", "wolf": "wolves", "half": "halves", "wife": "wives",
    "potato": "potatoes", "tomato": "tomatoes", "mango": "mangoes", "cactus": "cacti",
}  # fmt: skip
_AN = re.compile(r"(?:[aeiou]|hours?\b|honest|heir|x-ray|suv\b|mri\b|led\b|lcd\b)", re.IGNORECASE)
_NOT_AN = re.compile(r"(?:uni(?![nmd])|us[eu]|ut[ei]|urin|uk|eu|ewe|one\b|once\b|ufo\b)", re.IGNORECASE)


_CALLED = {"dining table": "table", "tv": "TV"}
"""Names of categories in sentences: COCO calls every table a dining table, even one next to a couch."""


def attributes(category: str) -> tuple[str | None, str | None, str]:
    """Return size, colour and noun of a category; its last word is the noun ("orange" is a fruit)."""
    words = category.lower().split()
    size = words.pop(0) if len(words) > 1 and words[0] in SIZES else None
    colour = words.pop(0) if len(words) > 1 and words[0] in COLOURS else None
    noun = " ".join(words)
    return size, colour, _CALLED.get(noun, noun)


def is_plural(noun: str) -> bool:
    """Return whether a noun is a plural or has no singular: "skis", "scissors", "people", "trees"."""
    last = noun.split()[-1]
    if last in _PLURAL_ONLY:
        return True
    if last == "skis":  # other words in -is are singular: "iris"
        return True
    return last.endswith("s") and not last.endswith(("ss", "us", "is")) and last not in _SINGULAR_IN_S | _SAME


def is_counted(noun: str) -> bool:
    """Return whether boxes of a noun can be counted: not "skis" (a box is a pair or half of one), not "broccoli"."""
    return noun.split()[-1] not in _MASS and not is_plural(noun)


def plural(noun: str) -> str:
    """Return the plural of a noun; if it has several words, the last one changes."""
    before, _, last = noun.rpartition(" ")
    if last in _SAME or last.endswith("fish") or not is_counted(noun):
        many = last
    elif last in _IRREGULAR:
        many = _IRREGULAR[last]
    elif (
        end := re.search(r"(?:(?<!otto)(?<!hu)(?<!ger)(?<!ro)(?<!sha)man|shelf|knife|wife|child)$", last)
    ) is not None:  # "fireman", "bookshelf"
        many = last[: end.start()] + _IRREGULAR[end.group()]
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        many = f"{last}es"
    elif re.search(r"[^aeiou]y$", last):
        many = f"{last[:-1]}ies"
    else:
        many = f"{last}s"
    return f"{before} {many}".strip()


def article(words: str) -> str:
    """Return `words` with "a" or "an" before them, or without if the noun has no singular or no plural."""
    if not is_counted(words):
        return words
    return f"an {words}" if _AN.match(words) and not _NOT_AN.match(words) else f"a {words}"


def verb(noun: str) -> str:
    """Return "are" for a plural or a noun without a singular, otherwise "is"."""
    return "are" if is_plural(noun) else "is"


def capital(text: str) -> str:
    """Return a text with a capital first letter; the other letters do not change ("The TV")."""
    return text[:1].upper() + text[1:]


def number(value: int) -> str:
    """Return a number as a word from zero ("no") to twelve, and as digits above."""
    return _NUMBERS[value] if value < len(_NUMBERS) else str(value)


def counted(value: int, noun: str) -> str:
    """Return a number with its noun: "one dog", "three dogs", "no dogs"."""
    return f"{number(value)} {noun if value == 1 else plural(noun)}"


def read_number(word: str) -> int | None:
    """Return the number that a word of a caption means, such as "three", "3" or "couple"; None for other words."""
    if word.isascii() and word.isdigit():
        return int(word)
    if word in _NUMBERS[1:]:
        return _NUMBERS.index(word)
    return {"couple": 2, "pair": 2, "both": 2, "duo": 2, "twin": 2, "trio": 3, "triple": 3, "dozen": 12}.get(word)


def listed(words: Sequence[str]) -> str:
    """Return words as a list in a sentence: "a cat", "a cat and a dog", "a cat, a dog and a bird"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def well_formed(text: str) -> bool:
    """Return whether a caption has no mistake that can be recognized without grammar: "a a", "a apple"."""
    words = re.findall(r"[a-z']+|\d+", text.lower().replace("\u2019", "'"))
    if {"laying", "lays", "layed"} & {*words}:  # for "lying" and "lies"
        return False
    for word, after in pairwise(words):
        if word == after and word not in ("that", "had"):
            return False
        if word in ("a", "an") and (word == "an") != bool(_AN.match(after) and not _NOT_AN.match(after)):
            return False
        if word in (*COLOURS, "though") and after in ("a", "an"):  # "red an orange", "walking though a forest"
            return False
        if word in _NUMBERS[2:] and (after.endswith("'s") or plural(after) != after and after in KIND_OF):
            return False  # "three giraffe's", "three giraffe"
    return len(words) > 1


def sentence(text: str) -> str:
    """Return a caption as a sentence: single spaces, a capital letter at its start and a full stop at its end."""
    text = " ".join(text.split())
    text = capital(text.lower() if text.isupper() else text)
    return text if text.endswith((".", "!", "?")) else f"{text}."
