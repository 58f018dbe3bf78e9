"""Independent check of questions and answers about an image: they are parsed and compared with its annotation.

It shares no code with the rules. A question is parsed by its form, its names are looked up in the boxes, captions are
parsed by `reading`, and the answer is computed again. What it cannot parse is an error, so that every wording is
checked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tests.synthesis.rules.reading import NUMBERS, allows, asserted_twice, many

Row = dict[str, Any]
_SIZES, _COLOURS = ("small", "medium", "large"), ("red", "orange", "yellow", "green", "blue", "purple")
_ROWS, _COLUMNS = ("top", "", "bottom"), ("left", "", "right")
_VERDICT = re.compile(r"(yes|no)\b", re.IGNORECASE)


@dataclass
class Thing:
    """A box of the annotation, with its category split into words."""

    words: list[str]
    bbox: list[float]

    @property
    def noun(self) -> str:
        """The category without colour and size."""
        return " ".join(word for word in self.words if word not in (*_SIZES, *_COLOURS)) or self.words[-1]

    def place(self) -> str:
        """Return the thirds of the image that contain the middle of the box, in words."""
        column, row = (int(3 * (self.bbox[k] + self.bbox[k + 2]) / 2) for k in (0, 1))
        return f"{_ROWS[row]} {_COLUMNS[column]}".strip() or "centre"

    def area(self) -> float:
        """Return the area of the box as a share of the image."""
        return (self.bbox[2] - self.bbox[0]) * (self.bbox[3] - self.bbox[1])


class Checker:
    """Checker of texts against the annotation of one image."""

    def __init__(
        self, captions: list[str], boxes: list[dict[str, Any]], *, complete: bool = False, crowds: tuple[str, ...] = ()
    ) -> None:
        self.captions, self.complete, self.crowds = captions, complete, crowds
        called = {"dining table": "table", "tv": "TV"}
        self.things = [Thing(called.get(box["category"], box["category"]).split(), box["bbox"]) for box in boxes]

    def fact(self, question: str, answer: str) -> tuple[str, ...]:
        """Check the answer, and return what the question is about.

        Raises:
            AssertionError: If the answer is wrong, or the question has an unknown form.
        """
        for pattern, check in _FORMS:
            if (match := re.fullmatch(pattern, question)) is not None:
                fact: tuple[str, ...] = check(self, answer, *match.groups())
                return fact
        raise AssertionError(f"no form for {question!r}")

    def all_of(self, words: str) -> list[Thing]:
        """Return the things that "red circle", "shape", "dog", "red circles" or "shape at the top" can mean."""
        words, _, where = re.sub(r" (?:at|in|on) the ", " @", words).partition(" @")
        found = []
        for thing in self.things:
            colour = [word for word in thing.words if word in _COLOURS][:1] if len(thing.words) > 1 else []
            kind = "animal" if thing.noun in ("cat", "dog", "horse", "sheep", "bear") else "shape"
            nouns = {thing.noun, many(thing.noun)} | ({kind, many(kind)} if self.complete else set())
            if any(words in (noun, *(f"{c} {noun}" for c in colour)) for noun in nouns):
                found.append(thing)
        return [thing for thing in found if not where or thing.place() == where]

    def one(self, name: str) -> Thing:
        """Return the only thing that "the ..." can mean."""
        found = self.all_of(name.removeprefix("the "))
        assert len(found) == 1, f"{name} may mean {len(found)} things"
        if not self.complete:
            self.number(found[0].noun, 1)
        return found[0]

    def number(self, words: str, value: int) -> str:
        """Check that boxes and captions agree with a number of things, and return their noun.

        Raises:
            AssertionError: If they do not agree.
        """
        found = self.all_of(words)
        assert len(found) == value, f"{len(found)} {words}, not {value}"
        if self.complete:
            return words
        noun = found[0].noun
        assert value < 10 and noun not in self.crowds, f"{noun} cannot be counted"
        assert noun not in ("skis", "scissors", "broccoli"), f"one box of {noun} is not one of it"
        assert allows(self.captions, noun, value), f"a caption speaks against {value} {noun}"
        return noun

    def index(self, name: str) -> str:
        """Return the index of the thing that a name means."""
        return str(self.things.index(self.one(name)))


def _verdict(answer: str) -> bool:
    match = _VERDICT.match(answer)
    assert match is not None, f"neither yes nor no: {answer!r}"
    return match.group(1).lower() == "yes"


def _there(c: Checker, answer: str, half: str | None, phrase: str, *_: str) -> tuple[str, ...]:
    if half is None:
        there = bool(c.all_of(phrase)) or phrase in c.crowds
        there = there or (not c.complete and asserted_twice(c.captions, phrase))
        assert there or c.complete, f"{phrase}: what is not marked, and not said twice, is not known to be there"
        assert _verdict(answer) == there
        return "there", phrase
    edge = {"left": (2, 1), "right": (0, -1), "upper": (3, 1), "lower": (1, -1)}[half]
    assert any(edge[1] * thing.bbox[edge[0]] <= edge[1] * 0.5 for thing in c.all_of(phrase)) and _verdict(answer)
    return "half", half, phrase


def _half(c: Checker, answer: str, phrase: str, half: str) -> tuple[str, ...]:
    return _there(c, answer, half, phrase)


def _plain_there(c: Checker, answer: str, phrase: str) -> tuple[str, ...]:
    return _there(c, answer, None, phrase)


def _several(c: Checker, answer: str, phrase: str) -> tuple[str, ...]:
    assert (len(c.all_of(phrase)) > 1 or phrase in c.crowds) and _verdict(answer)
    assert phrase not in ("skis", "scissors", "broccoli")
    return "several", phrase


def _count(c: Checker, answer: str, phrase: str) -> tuple[str, ...]:
    value = int(answer) if answer.isdigit() else NUMBERS.index(answer.lower().split()[2])
    return "count", c.number(phrase, value)


def _where(c: Checker, answer: str, name: str) -> tuple[str, ...]:
    thing = c.one(name)
    said = re.sub(r"^.* (?:at|on|in) the (.*)\.$", r"\1", answer)
    assert said == thing.place(), f"{name} is {thing.place()}, not {said}"
    return "place", c.index(name)


def _attribute(kind: str) -> Any:
    def check(c: Checker, answer: str, name: str) -> tuple[str, ...]:
        words = c.one(name).words
        told = {
            "size": [word for word in words if word in _SIZES],
            "colour": [word for word in words if word in _COLOURS],
        }
        value = told.get(kind, words[-1:])[0]
        assert answer.rstrip(".").split()[-1] == value
        return kind, c.index(name)

    return check


def _relation(c: Checker, answer: str, first: str, word: str, second: str, *_: str) -> tuple[str, ...]:
    a, b = c.one(first).bbox, c.one(second).bbox
    axis = 0 if word.endswith("of") else 1
    before, after = a[axis + 2] < b[axis], b[axis + 2] < a[axis]
    assert before or after, f"{first} and {second} are not apart"
    assert _verdict(answer) == (before if word in ("left of", "above") else after)
    right = re.search(r"(left of|right of|above|below)", answer)
    if right:
        assert (right.group(1) in ("left of", "above")) == before
    return "relation", str(axis), *sorted((c.index(first), c.index(second)))


def _compare(c: Checker, answer: str, first: str, word: str, second: str) -> tuple[str, ...]:
    a, b = c.one(first).area(), c.one(second).area()
    assert max(a, b) >= 1.9 * min(a, b)
    assert _verdict(answer) == ((a > b) == (word in ("larger", "more")))
    return "comparison", *sorted((c.index(first), c.index(second)))


def _share(c: Checker, answer: str, name: str, word: str) -> tuple[str, ...]:
    assert c.one(name).area() < 0.5
    assert _verdict(answer) == (word == "less")
    return "share", c.index(name)


def _outermost(c: Checker, answer: str, noun: str, others: str) -> tuple[str, ...]:
    boxes = [thing.bbox for thing in c.all_of(noun)]
    assert others == many(noun)
    c.number(noun, len(boxes))
    left = sum(all(a[2] < b[0] for b in boxes if b is not a) for a in boxes)
    right = sum(all(a[0] > b[2] for b in boxes if b is not a) for a in boxes)
    assert (left, right) == ((1, 0) if re.search(r"\bleft\b", answer) else (0, 1))
    return "outermost", noun


def _summary(c: Checker, answer: str) -> tuple[str, ...]:
    def plain(text: str) -> str:
        return " ".join(text.lower().split()).rstrip(".")

    assert plain(answer) in [plain(caption) for caption in c.captions]
    return ("summary",)


_ARTICLE = r"(?:an? )?"
_FORMS: list[tuple[str, Any]] = [
    (rf"(?:Is there|Do you see) {_ARTICLE}(.+) in the (left|right|upper|lower) half of the picture\?", _half),
    (r"(?:Is there|Can you see) more than one (.+)\?", _several),
    (rf"(?:Is there|Are there|Can you see) {_ARTICLE}(.+?)(?: in the picture)?\?", _plain_there),
    (r"How many (.+) (?:are there|are in the picture|do you see)\?", _count),
    (r"(?:Where|Where in the picture|In which part of the picture) is (the .+)\?", _where),
    (r"(?:What colour is|Which colour does) (the .+?)(?: have)?\?", _attribute("colour")),
    (r"What is (the .+)\?", _attribute("noun")),
    (r"What form (?:is|does) (the .+?)(?: have)?\?", _attribute("form")),
    (r"(?:What size|How large) is (the .+)\?", _attribute("size")),
    (r"Is (the .+) (left of|right of|above|below) (the .+?)( in the picture)?\?", _relation),
    (r"Is (the .+) (larger|smaller) than (the .+)\?", _compare),
    (r"Does (the .+) take up (more|less) than half of the picture\?", _share),
    (r"Does (the .+) take up (more|less) of the picture than (the .+)\?", _compare),
    (r"One (.+) is clearly apart from all the other (.+): on which side of them, left or right\?", _outermost),
    (r"What is going on in the picture\?|What does the picture show\?|How would you sum up the scene\?", _summary),
]


def steps(c: Checker, question: str, answer: str) -> None:
    """Check a question of several steps, and the steps and the end of its answer, against the annotation."""
    end = re.split(r"so the answer is |so it is |So it is ", answer)[-1].rstrip(".")
    if match := re.fullmatch(r"Are there more (.+) than (.+)\?", question):
        a, b = (len(c.all_of(words)) for words in match.groups())
        for words, value in zip(match.groups(), (a, b), strict=True):
            c.number(words, value)
        assert end == ("yes" if a > b else "no")
        _have(answer, a, b)
    elif match := re.fullmatch(r"How many (.+) and (.+) are there together\?", question):
        a, b = (len(c.all_of(words)) for words in match.groups())
        for words, value in zip(match.groups(), (a, b), strict=True):
            c.number(words, value)
        assert end == (NUMBERS[a + b] if a + b < len(NUMBERS) else str(a + b))
        _have(answer, a, b)
    elif match := re.fullmatch(r"Of (the .+), (the .+) and (the .+), which is (.+) in the picture\?", question):
        *names, word = match.groups()
        axis = {"furthest to the left": 0, "highest up": 1}[word]
        assert min(names, key=lambda name: c.one(name).bbox[axis + 2]) == end
        assert all(c.one(end).bbox[axis + 2] < c.one(name).bbox[axis] for name in names if name != end)
        assert all(name in answer for name in names)
    elif match := re.fullmatch(r"Which takes up more of the picture, (.+) or (.+), and where is it\?", question):
        name, _, where = end.partition(", ")
        assert name == max(match.groups(), key=lambda one: c.one(one).area())
        assert where.split(" ", 2)[2] == c.one(name).place()
    else:
        raise AssertionError(f"no form for {question!r}")


def _have(answer: str, a: int, b: int) -> None:
    said = re.match(r"There (?:is|are) (\w+) .*? and (\w+) ", answer)
    assert said is not None
    assert [NUMBERS.index(word) for word in said.groups()] == [a, b]


def description(c: Checker, text: str) -> int:
    """Check a description, which starts with a caption, against the boxes; return how many sentences it adds."""
    plain = [" ".join(caption.split()).rstrip(".").lower() for caption in c.captions]
    (caption,) = {one for one in plain if text.lower().startswith(f"{one}.")}
    added = re.findall(r"[^.]+\.", text[len(caption) + 1 :])
    for one in (sentence.strip() for sentence in added):
        if match := re.fullmatch(r"The (.+) is (?:at|on|in) the (.+)\.", one):
            assert c.one(match.group(1)).place() == match.group(2)
        elif match := re.fullmatch(r"There are (\w+) (.+)\.", one):
            count = len(c.all_of(match.group(2)))
            if match.group(1) == "several":
                assert count > 2 and match.group(2) not in ("skis", "scissors", "broccoli")
            else:
                c.number(match.group(2), NUMBERS.index(match.group(1)))
        else:
            match = re.fullmatch(r"The (.+?) is ([a-z ]+?) (the .+) in the picture\.", one)
            assert match is not None, f"no form for {one!r}"
            for word in match.group(2).split(" and "):
                _relation(c, "Yes", f"the {match.group(1)}", word, match.group(3))
    return len(added)
