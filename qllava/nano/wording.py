"""Other words for the plain questions of nano, as people type them.

`language` and `further` ask each question in one plain form. Here a plain question becomes one of many: other verbs and
nouns, requests, bare keywords, polite or terse, in lower case, without a question mark, with a typo. The answer stays
the same, so what is learned from them is the question and not its wording.
"""

from __future__ import annotations

import random
import re

from qllava.nano import patterns

_CHOICE = re.compile(r"\(([^()]*)\)")
_KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def reword(plain: str, rng: random.Random, *, noise: float = 0.35) -> str:
    """Return a plain question in other words.

    Args:
        plain: A question as `language`, `further` or `And the red circle?` asks it.
        rng: Draws the words.
        noise: Share of the results that are also typed carelessly: see `careless`.

    Raises:
        ValueError: No pattern is known for the question.
    """
    known = ((asked.fullmatch(plain), templates) for asked, templates in patterns.ASKED)
    found, templates = next(((found, templates) for found, templates in known if found), (None, ()))
    if found is None:
        raise ValueError(f"no other words are known for {plain!r}")
    parts = [_phrase(part, rng) for part in found.groups()]
    attribute = next((part for part in found.groups() if part in patterns.ATTRIBUTE), "colour")
    values = {
        "a": patterns.ATTRIBUTE[attribute],
        "c": patterns.ATTRIBUTE["colour"],
        "seen": patterns.SEEN,
        "tell": patterns.TELL,
        "give": patterns.GIVE,
    }
    said = _draw(rng.choice(templates).format(*parts, **values), rng)
    said = said[0].upper() + said[1:]
    return careless(said, rng) if rng.random() < noise else said


def careless(text: str, rng: random.Random) -> str:
    """Return a question as it is typed in a hurry: lower case, no question mark, a typo, or with polite words."""
    if rng.random() < 0.25:
        text = rng.choice(
            ("Please: {}", "Hey, {}", "Hi! {}", "{} Please.", "{} Thanks!", "So, {}", "Ok, {}", "Well, {}")
        ).format(text)
    if rng.random() < 0.6:
        text = text.lower()
    if rng.random() < 0.5:
        text = text.rstrip("?.!") or text
    elif rng.random() < 0.2:
        text = text.rstrip("?.!") + rng.choice((" ?", "??", "?!", ".", "..."))
    if rng.random() < 0.3:
        text = _typo(text, rng)
    return text


def _typo(text: str, rng: random.Random) -> str:
    """One wrong letter in one of the longer words: left out, doubled, swapped with the next, or from the next key."""
    places = list(re.finditer(r"[a-zA-Z]{4,}", text))
    if not places:
        return text
    word = rng.choice(places)
    at = rng.randrange(word.start() + 1, word.end() - 1)
    letter, following = text[at], text[at + 1]
    row = next((keys for keys in _KEYBOARD if letter.lower() in keys), letter.lower())
    beside = row[(row.index(letter.lower()) + 1) % len(row)]
    changed = rng.choice((following, letter * 2 + following, following + letter, beside + following))
    return text[:at] + changed + text[at + 2 :]


def _phrase(part: str, rng: random.Random) -> str:
    """What a plain question names, in other words: the places, sizes, forms and "shape" in it."""
    for place, said in patterns.PLACES.items():
        if part.endswith(place):
            # "at the top" ends no "at the top left", which comes first.
            rest = part.removesuffix(place).strip()
            return f"{_phrase(rest, rng)} {said}".strip() if rest else said
    if part in patterns.RELATIONS:
        return patterns.RELATIONS[part]
    words = [patterns.GENERIC if word == "shape" else patterns.WORDS.get(word, word) for word in part.split()]
    return " ".join(words)


def _draw(pattern: str, rng: random.Random) -> str:
    """Draw one of each (a|b|c), the innermost first."""
    while found := _CHOICE.search(pattern):
        pattern = pattern[: found.start()] + rng.choice(found[1].split("|")) + pattern[found.end() :]
    return " ".join(pattern.split())
