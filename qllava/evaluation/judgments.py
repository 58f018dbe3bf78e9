"""Files of judgments: a judge's verdicts on pairs of answers that people voted on (`qllava.voting.votes`).

`qllava eval judge --votes` writes one JSON line for each vote and order of the two answers:

    {"id": "5f0c", "order": "left-first" | "right-first", "vote": "left" | "right" | "tie" | "both_bad" | null,
     "judge": ..., "reply": ...}

`left` is the vote's left answer in both orders, first or second for the judge; null means a reply without a verdict.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from qllava.config import InputError
from qllava.data.problems import Place, Problem, RecordError
from qllava.data.records import read_records, record_id
from qllava.voting.votes import ONE_OF, VERDICTS, Verdict

JudgeOrder = Literal["left-first", "right-first"]
ORDERS: tuple[JudgeOrder, ...] = get_args(JudgeOrder)


@dataclass(frozen=True)
class Judgment:
    """Decision of a judge about the answers of one vote, shown in one order."""

    id: str
    """Id of the vote."""
    order: JudgeOrder
    """Order in which the judge saw the answers."""
    vote: Verdict | None
    """Verdict; None if the reply could not be read."""
    judge: str
    """Name of the judge's model."""
    reply: str = ""
    """Reply of the judge."""

    def to_json(self) -> dict[str, Any]:
        """Return the record for a file of judgments."""
        return {"id": self.id, "order": self.order, "vote": self.vote, "judge": self.judge, "reply": self.reply}


def read_judgments(path: Path) -> list[Judgment]:
    """Return the judgments of one judge.

    Raises:
        InputError: A line is not a judgment, a vote has two judgments in the same order, or the file has judgments of
            several judges or none.
    """
    judgments: dict[tuple[str, str], Judgment] = {}
    for place, record in read_records(path):
        found = _judgment(record, place)
        if (found.id, found.order) in judgments:
            problem = f"this vote already has a judgment for the order {found.order}"
            raise RecordError(Problem("judged twice", problem, "remove one of them", place, found.id))
        judgments[found.id, found.order] = found
    judges = sorted({found.judge for found in judgments.values()})
    if not judges:
        raise InputError(f"{path} has no judgments. Make them with `qllava eval judge --votes`.")
    if len(judges) > 1:
        raise InputError(f"{path} has judgments of {' and '.join(judges)}. Give the judgments of one judge at a time.")
    return list(judgments.values())


def _judgment(record: Any, place: Place) -> Judgment:
    id = record_id(record, place, "id")
    if record.get("order") not in ORDERS:
        problem = f"the order is {record.get('order')!r}"
        raise RecordError(Problem("order", problem, f"expected {' or '.join(ORDERS)}", place, id))
    if "vote" not in record or (record["vote"] is not None and record["vote"] not in VERDICTS):
        problem = f"the vote is {record.get('vote', 'missing')!r}"
        raise RecordError(Problem("vote", problem, f"expected {ONE_OF}, or null if it could not be read", place, id))
    return Judgment(id, record["order"], record["vote"], str(record.get("judge", "")), str(record.get("reply", "")))
