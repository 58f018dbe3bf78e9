"""Score nano's answers to a list of questions that visitors typed, with right answers marked by hand.

    python -m tests.nano.visitors MODEL [LIST]

The list (`asked.json`) was written from three scenes (`examples/scenes`) and the README alone, by an author who had not
seen how nano's own questions are made.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qllava.nano.unknown import SENTENCE

LIST = Path(__file__).with_name("asked.json")
SCENES = Path(__file__).resolve().parents[2] / "examples" / "scenes"
_NUMBERS = {"0": "zero", "1": "one", "2": "two", "3": "three", "4": "four", "5": "five"}


@dataclass(frozen=True)
class Asked:
    """A question, and what is right."""

    image: str
    """File name of a scene."""
    question: str
    """As it was typed."""
    about_shapes: bool
    """Or about anything else."""
    right: tuple[str, ...]
    """Accepted answers; "*" for a description, which must name all of `names`."""
    names: tuple[tuple[str, ...], ...] = ()
    """What a description says of each shape: size, colour, form and place."""


def read(path: Path = LIST) -> list[Asked]:
    """Return the questions of a list."""
    return [
        Asked(
            one["image"], one["question"], one["about"] == "shapes", tuple(one["right"]),
            tuple(tuple(shape) for shape in one.get("names", ())),
        )
        for one in json.loads(path.read_text(encoding="utf-8"))
    ]  # fmt: skip


def normal(text: str) -> str:
    """Return a text in lower case, without punctuation and articles, and digits in words."""
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(_NUMBERS.get(word, word) for word in words if word not in ("a", "an", "the"))


def is_right(asked: Asked, answer: str) -> bool:
    """Return whether an answer is one of the accepted ones, names what a description must, or is nano's sentence."""
    if not asked.about_shapes:
        return answer.strip() == SENTENCE
    if asked.right == ("*",):
        said = f" {normal(answer)} "
        return all(f" {normal(word)} " in said for shape in asked.names for word in shape)
    return normal(answer) in {normal(one) for one in asked.right}


def repeats(answer: str) -> bool:
    """Return whether an answer repeats itself: three words that come five times, or anything ten times in a row."""
    words = answer.split()
    threes = Counter(zip(words, words[1:], words[2:], strict=False))
    return any(n >= 5 for n in threes.values()) or re.search(r"(\S+)(?:\s*\1){9}", answer) is not None


def score(chat: Any, questions: list[Asked]) -> list[tuple[Asked, str, bool]]:
    """Return each question with the model's greedy answer, and whether it is right."""
    answers = chat.answer_batch([(SCENES / one.image, one.question) for one in questions], max_new_tokens=128)
    return [(one, answer, is_right(one, answer)) for one, answer in zip(questions, answers, strict=True)]


def main() -> None:
    """Print the wrong answers and the figures."""
    from qllava.inference import load

    results = score(load(sys.argv[1]), read(Path(sys.argv[2]) if len(sys.argv) > 2 else LIST))
    for asked, answer, right in results:
        if not right:
            print(f"{asked.image}  {asked.question!r} -> {answer!r}, right: {', '.join(asked.right[:3])}")
    for kind, about in (("about shapes", True), ("others", False)):
        of_kind = [right for asked, _, right in results if asked.about_shapes is about]
        print(f"{kind}: {sum(of_kind)} of {len(of_kind)} right ({100 * sum(of_kind) / len(of_kind):.1f} %)")
    print(f"with a repetition: {sum(repeats(answer) for _, answer, _ in results)}")


if __name__ == "__main__":
    main()
