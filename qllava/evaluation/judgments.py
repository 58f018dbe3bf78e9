"""A judge's verdicts on pairs of answers that people voted on: JSON lines, beside the votes of `qllava.voting.votes`.

What `qllava eval judge --votes` writes, one line for each vote and order of the two answers:

    {"id": "5f0c", "order": "left-first" | "right-first", "vote": "left" | "right" | "tie" | "both_bad" | null,
     "judge": ..., "reply": ...}

`left` is the vote's left answer in both orders, wherever the judge saw it; null means a reply without a verdict.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from qllava.config import InputError
from qllava.data.problems import Place, Problem, RowError
from qllava.data.rows import read_rows, row_id
from qllava.voting.votes import ONE_OF, VERDICTS, Verdict

JudgeOrder = Literal["left-first", "right-first"]
ORDERS: tuple[JudgeOrder, ...] = get_args(JudgeOrder)


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


def _judgment(row: Any, place: Place) -> Judgment:
    id = row_id(row, place, "id")
    if row.get("order") not in ORDERS:
        problem = f"the order is {row.get('order')!r}"
        raise RowError(Problem("order", problem, f"expected {' or '.join(ORDERS)}", place, id))
    if "vote" not in row or (row["vote"] is not None and row["vote"] not in VERDICTS):
        problem = f"the vote is {row.get('vote', 'missing')!r}"
        raise RowError(Problem("vote", problem, f"expected {ONE_OF}, or null where it could not be read", place, id))
    return Judgment(id, row["order"], row["vote"], str(row.get("judge", "")), str(row.get("reply", "")))
