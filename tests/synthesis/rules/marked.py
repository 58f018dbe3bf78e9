"""Two hundred answers of the rules about the forty contexts, each marked by a person, and how they are drawn.

    pool(contexts)     {("000000296284", question): Answer(sort, answer)}: all answers of the rules with seed 31
    draw(contexts)     the ids and questions of 200 of them

The sorts of questions are drawn in turn, each in a random order, so that rare and difficult sorts are not outnumbered
by easy ones: the sample is harder than what a user gets. Marks are in `marked_answers.json`:

    true            follows from captions and boxes of the context (the person sees no image), in good English
    false           captions or boxes contradict it, or do not state it
    ungrammatical   true, but not good English
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qllava.data.contexts import Context
from qllava.synthesis.rules.examples import write
from qllava.synthesis.rules.questions import questions
from qllava.synthesis.rules.view import View

SEED, SIZE = 31, 200
FILE = Path(__file__).with_name("marked_answers.json")


@dataclass(frozen=True)
class Answer:
    """Answer of the rules to a question."""

    sort: str
    """Sort of the question: one of `questions`, "detail" or "reasoning"."""

    text: str
    """The answer."""


def pool(contexts: Sequence[Context]) -> dict[tuple[str, str], Answer]:
    """Return every question of a conversation, and one description and one reason, of each context."""
    out: dict[tuple[str, str], Answer] = {}
    for context in contexts:
        rng = random.Random(f"{SEED} {context.id}")
        for sort, asked in questions(View(context), rng).items():
            out.update({(context.id, one.text): Answer(sort, one.answer) for one in asked})
        for row in write(context, ["detail", "reasoning"], seed=SEED):
            question, answer = (turn["value"].removeprefix("<image>\n") for turn in row["conversations"])
            out[context.id, question] = Answer(row["type"], answer)
    return out


def draw(contexts: Sequence[Context]) -> list[tuple[str, str]]:
    """Return the context ids and questions of the sample."""
    rng = random.Random(SEED)
    sorts: dict[str, list[tuple[str, str]]] = {}
    for key, answer in sorted(pool(contexts).items(), key=lambda item: item[0]):
        sorts.setdefault(answer.sort, []).append(key)
    for keys in sorts.values():
        rng.shuffle(keys)
    drawn: list[tuple[str, str]] = []
    while len(drawn) < SIZE and any(sorts.values()):
        drawn += [keys.pop() for _, keys in sorted(sorts.items()) if keys and len(drawn) < SIZE]
    return drawn[:SIZE]


def marked() -> list[dict[str, str]]:
    """Return the marked answers: id, question, answer, mark and, unless it is true, the reason."""
    answers: list[dict[str, str]] = json.loads(FILE.read_text(encoding="utf-8"))["answers"]
    return answers


def refused() -> list[dict[str, str]]:
    """Return answers that the rules must not give: id, a part of the answer, mark and the reason."""
    answers: list[dict[str, str]] = json.loads(FILE.read_text(encoding="utf-8"))["refused"]
    return answers
