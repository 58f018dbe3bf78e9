"""Votes of people on pairs of answers, and a judge's on the same pairs; both are JSON lines.

A vote is what the demo writes when two models answer side by side (other keys are let stand):

    {"id": "5f0c", "time": ..., "question": "What is it?", "pictures": ["<hash>"], "answers": {"left": ..., "right": ...},
     "models": {"left": ..., "right": ...}, "vote": "left" | "right" | "tie" | "both_bad", "rater": "ann", "seed": 7}

A judgment is what `qllava eval judge --votes` writes, one line for each vote and order of the two answers:

    {"id": "5f0c", "order": "left-first" | "right-first", "vote": "left" | "right" | "tie" | "both_bad" | null, "judge": ...}

`left` is the vote's left answer in both orders, wherever the judge saw it; null stands for a reply without a verdict.
"""  # noqa: E501

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from qllava.config import InputError
from qllava.data.rows import Place, Problem, RowError, read_rows
from qllava.evaluation.answers import row_id, row_text

Verdict = Literal["left", "right", "tie", "both_bad"]
JudgeOrder = Literal["left-first", "right-first"]
VERDICTS: tuple[Verdict, ...] = ("left", "tie", "right", "both_bad")
ORDERS: tuple[JudgeOrder, ...] = get_args(JudgeOrder)


@dataclass(frozen=True)
class Vote:
    """What one person decided about two answers."""

    id: str
    question: str
    pictures: tuple[str, ...]  # their hashes
    left: str  # the answers
    right: str
    vote: Verdict
    rater: str | None  # None where it is not known who voted
    context: str = ""  # what was said before the question, if anything, as JSON

    @property
    def asked(self) -> tuple[str, tuple[str, ...], str]:
        """What was asked about which pictures: votes that share it are not independent of each other."""
        return self.question, self.pictures, self.context


@dataclass(frozen=True)
class Judgment:
    """What a judge decided about the answers of one vote, shown in one order."""

    id: str  # the vote's
    order: JudgeOrder
    vote: Verdict | None  # None: the reply could not be read
    judge: str  # the model's name
    reply: str = ""  # as the judge wrote it

    def to_json(self) -> dict[str, Any]:
        """The line of a file of judgments."""
        return {"id": self.id, "order": self.order, "vote": self.vote, "judge": self.judge, "reply": self.reply}


def read_votes(path: Path) -> list[Vote]:
    """The votes of a file. Raises InputError for a line that is none, for a second one of its id, and for no votes."""
    votes: dict[str, Vote] = {}
    for place, row in read_rows(path):
        vote = _vote(row, place)
        if vote.id in votes:
            raise RowError(Problem("vote twice", "another vote has this id", "keep one of them", place, vote.id))
        votes[vote.id] = vote
    if not votes:
        raise InputError(f"{path} holds no votes; collect some with the demo's --votes.")
    return list(votes.values())


def read_judgments(path: Path) -> list[Judgment]:
    """The judgments of one judge. Raises InputError for a line that is none, a second one of its vote and order,
    for a second judge, and for no judgments.
    """
    judgments: dict[tuple[str, str], Judgment] = {}
    for place, row in read_rows(path):
        found = _judgment(row, place)
        if (found.id, found.order) in judgments:
            problem = f"this vote has a judgment {found.order} already"
            raise RowError(Problem("judged twice", problem, "keep one of them", place, found.id))
        judgments[found.id, found.order] = found
    judges = sorted({found.judge for found in judgments.values()})
    if not judges:
        raise InputError(f"{path} holds no judgments; make them with `qllava eval judge --votes`.")
    if len(judges) > 1:
        raise InputError(f"{path} holds judgments of {' and '.join(judges)}; give one judge's at a time.")
    return list(judgments.values())


def _vote(row: Any, place: Place) -> Vote:
    id = row_id(row, place, "id")
    answers, pictures, rater = row.get("answers"), row.get("pictures", []), row.get("rater")
    if not isinstance(answers, dict):
        raise RowError(Problem("no answers", "there is no object under 'answers'", "give it left and right", place, id))
    if not isinstance(pictures, list) or not all(isinstance(picture, str) for picture in pictures):
        raise RowError(Problem("pictures", "'pictures' is no list of texts", "give the pictures' hashes", place, id))
    if row.get("vote") not in VERDICTS:
        raise RowError(Problem("vote", f"the vote is {row.get('vote')!r}", f"expected {_ONE_OF}", place, id))
    return Vote(
        id=id,
        question=row_text(row, "question", place, id),
        pictures=tuple(pictures),
        left=row_text(answers, "left", place, id),
        right=row_text(answers, "right", place, id),
        vote=row["vote"],
        rater=None if rater in (None, "") else str(rater),
        context=_said_before(row.get("conversation")),
    )


def _said_before(conversation: Any) -> str:
    """What both models were told before the question, which ends a conversation; as JSON, empty for nothing."""
    turns = conversation if isinstance(conversation, list) else []
    if turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "user":
        turns = turns[:-1]
    return json.dumps(turns, ensure_ascii=False) if turns else ""


def _judgment(row: Any, place: Place) -> Judgment:
    id = row_id(row, place, "id")
    if row.get("order") not in ORDERS:
        problem = f"the order is {row.get('order')!r}"
        raise RowError(Problem("order", problem, f"expected {' or '.join(ORDERS)}", place, id))
    if "vote" not in row or (row["vote"] is not None and row["vote"] not in VERDICTS):
        problem = f"the vote is {row.get('vote', 'missing')!r}"
        raise RowError(Problem("vote", problem, f"expected {_ONE_OF}, or null where it could not be read", place, id))
    return Judgment(id, row["order"], row["vote"], str(row.get("judge", "")), str(row.get("reply", "")))


_ONE_OF = "left, right, tie or both_bad"
