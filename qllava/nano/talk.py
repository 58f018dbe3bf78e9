"""Conversations about a scene as people have them: plain and in other words, about shapes and about anything else."""

from __future__ import annotations

import random
import re

from qllava.nano import further, language, unknown
from qllava.nano.scenes import Scene
from qllava.nano.wording import careless, reword

PLAIN = 0.2
"""Share of the questions that stay in their plain form."""
_UNKNOWN, _FOLLOW_UP, _FURTHER = 0.08, 0.06, 0.36
"""Shares of the questions that are not about shapes, that leave out what they ask, and that are of `further`."""
_ATTRIBUTE = re.compile(r"What (colour|form|size) is |(Where) is ")
_WHY = (
    "Give your reasons.", "Give your reasons.", "Why?", "Explain.", "Explain your answer.", "Give a reason.",
    "How do you know?", "Please explain why.",
)  # fmt: skip


def turns(
    scene: Scene, rng: random.Random, count: int, types: tuple[str, ...] = language.TYPES
) -> list[tuple[str, str]]:
    """Return `count` questions and their answers; those of the eight types are drawn from `types`.

    No plain form comes twice, apart from "And the star?", which follows different questions.
    """
    out: list[tuple[str, str]] = []
    asked: set[str] = set()
    attribute = ""
    while len(out) < count:
        kind = rng.random()
        if kind < _UNKNOWN:
            out.append((unknown.ask(rng), unknown.SENTENCE))
            continue
        if kind < _UNKNOWN + _FOLLOW_UP:
            if not attribute:
                continue
            plain, answer = further.follow_up(scene, rng, attribute)
        elif kind < _UNKNOWN + _FOLLOW_UP + _FURTHER:
            plain, answer = further.ask(scene, rng)
        elif (question := language.ask(scene, rng.choice(types), rng)) is not None:
            plain, answer = question.text, question.answer
        else:
            continue
        if plain in asked:
            continue
        if not plain.startswith("And "):
            asked.add(plain)
            found = _ATTRIBUTE.match(plain)
            attribute = (found[1] or "place") if found else ""
        out.append((said(plain, rng), answer))
    return out


def said(plain: str, rng: random.Random) -> str:
    """Return a plain question as somebody may type it; at times as it is."""
    return plain if rng.random() < PLAIN else reword(plain, rng)


def detail(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Return a request for a description in anyone's words, and the detailed description."""
    return reword("Describe the picture.", rng), language.detail(scene, rng)[1]


def reasoning(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Return a question that asks for its reasons, and the reasons followed by the answer."""
    plain, answer = language.reasoning(scene, rng)
    asked = said(plain.removesuffix(" Give your reasons."), rng)
    asked = asked if asked[-1] in "?.!" else f"{asked}?"
    return f"{asked} {careless(rng.choice(_WHY), rng)}", answer
