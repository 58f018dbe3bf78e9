"""Output of a run: the examples, the tasks left out with their reasons, and the count of every outcome.

    OUT.json             examples in LLaVA's format, by image and then by type; OUT.jsonl: one example per line
    OUT.left_out.jsonl   {"id", "type", "outcome", "reason", "reply"} of every other task; no file if there is none
    OUT.calls.jsonl      the replies (see `llm.store`)

The first two are written to a temporary file and renamed, so that a reader sees the complete old or new file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from qllava.conversation import ask
from qllava.files import unwritable, whole_file
from qllava.synthesis.replies import Turns
from qllava.synthesis.tasks import Needed, Settled, Task

Outcome: TypeAlias = Literal["accepted", "repaired", "dropped", "failed", "left"]
"""Outcome of a task.

accepted: the first reply keeps the rules; repaired: the second one does; dropped: neither does; failed: no reply after
every attempt; left: not requested yet.
"""
OUTCOMES: tuple[Outcome, ...] = ("accepted", "repaired", "dropped", "failed", "left")


@dataclass
class Counts:
    """Counts of the outcomes of a run's tasks."""

    by_type: dict[str, Counter[Outcome]] = field(default_factory=dict)
    """Tasks of each response type, by outcome."""
    broken: Counter[str] = field(default_factory=Counter)
    """First replies, by the rule that they break."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Dropped tasks, by the rule that their last reply breaks."""

    def add(self, task: Task, outcome: Outcome, end: Needed | Settled | None) -> None:
        """Count one task."""
        self.by_type.setdefault(task.type, Counter())[outcome] += 1
        if isinstance(end, Settled):
            self.broken[end.first or ""] += end.first is not None
            self.dropped[end.reason or ""] += end.reason is not None

    def total(self, outcome: Outcome) -> int:
        """Return the number of tasks with an outcome, over all types."""
        return sum(counts[outcome] for counts in self.by_type.values())

    def to_json(self) -> dict[str, Any]:
        """Return every count by name; each task has exactly one outcome."""
        return {
            "tasks": sum(counts.total() for counts in self.by_type.values()),
            "rows": self.total("accepted") + self.total("repaired"),
            "outcomes": {outcome: self.total(outcome) for outcome in OUTCOMES},
            "by_type": {type_: {o: counts[o] for o in OUTCOMES} for type_, counts in self.by_type.items()},
            "broken": {rule: n for rule, n in self.broken.most_common() if n},
            "dropped": {rule: n for rule, n in self.dropped.most_common() if n},
        }

    def text(self) -> str:
        """Return the counts as a table for the terminal."""
        head = f"{'':<14}" + "".join(f"{outcome:>10}" for outcome in OUTCOMES)
        lines = [f"{type_:<14}" + "".join(f"{n[o]:>10,}" for o in OUTCOMES) for type_, n in self.by_type.items()]
        for title, rules in (("First replies that broke a rule", self.broken), ("Dropped", self.dropped)):
            said = ", ".join(f"{rule} {n:,}" for rule, n in rules.most_common() if n)
            lines += [f"{title}: {said}"] if said else []
        return "\n".join([head, *lines])


def outcome_of(end: Needed | Settled | None, failed: bool) -> Outcome:
    """Return the outcome of a task; an end of None means that an error kept the task from having one."""
    if end is None:
        return "failed"
    if isinstance(end, Needed):
        return "failed" if failed else "left"
    if end.reason is not None:
        return "dropped"
    return "accepted" if end.first is None else "repaired"


def beside(out: Path, name: str) -> Path:
    """Return the path of a file that belongs to an output, such as OUT.calls.jsonl for OUT.json."""
    return out.with_name(f"{out.stem}.{name}.jsonl")


def llava_record(task: Task, turns: Turns) -> dict[str, Any]:
    """Return an example in LLaVA's format, with the image token before the first question."""
    said = [
        {"from": side, "value": value}
        for number, (question, answer) in enumerate(turns)
        for side, value in (("human", question if number else ask(question)), ("gpt", answer))
    ]
    return {"id": task.id, "image": task.context.image, "conversations": said, "type": task.type}


def write_output(
    out: Path, tasks: Iterable[Task], end_of: Callable[[Task], Needed | Settled | None], failed: Mapping[str, str]
) -> Counts:
    """Write the examples and what was left out.

    Args:
        out: File of the examples.
        tasks: Tasks of the run, in the order of the output.
        end_of: Returns the end of a task; None if an error kept it from having one, whose reason is in `failed`.
        failed: Reasons of the tasks that failed, by task id.

    Returns:
        Counts of the outcomes.

    Raises:
        InputError: A file cannot be written; its previous content is then unchanged.
    """
    counts = Counts()
    left_out = beside(out, "left_out")
    start, between, end = ("", "\n", "\n") if out.suffix == ".jsonl" else ("[", ",\n", "]\n")
    try:
        # Context managers exit in reverse order, so the file of the examples is renamed first.
        with (
            whole_file(left_out) as others,
            whole_file(out) as kept,
            kept.open("w", encoding="utf-8") as records,
            others.open("w", encoding="utf-8") as rest,
        ):
            records.write(start)
            written = 0
            for task in tasks:
                step = end_of(task)
                outcome = outcome_of(step, task.id in failed)
                counts.add(task, outcome, step)
                if isinstance(step, Settled) and step.reason is None:
                    records.write((between if written else "") + _line(llava_record(task, step.turns)))
                    written += 1
                else:
                    rest.write(_line(_left_out(task, outcome, step, failed.get(task.id))) + "\n")
            records.write(end if written or start else "")
        if counts.total("accepted") + counts.total("repaired") == sum(n.total() for n in counts.by_type.values()):
            left_out.unlink()
    except OSError as error:
        raise unwritable(out, error) from error
    return counts


def _left_out(task: Task, outcome: Outcome, end: Needed | Settled | None, failure: str | None) -> dict[str, Any]:
    about: dict[str, Any] = {"id": task.context.id, "type": task.type, "outcome": outcome}
    if isinstance(end, Settled):
        return {**about, "reason": end.reason, "reply": end.said}
    return {**about, "reason": failure or "not asked yet"}


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False)
