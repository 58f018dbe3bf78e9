"""What a run leaves: the examples, what was left out and why, and the count of every outcome.

    OUT.json             LLaVA's examples, in the order of the images, then of the types; OUT.jsonl: an example a line
    OUT.left_out.jsonl   {"id", "type", "outcome", "reason", "reply"} of every other task; no file where there is none
    OUT.calls.jsonl      the replies (see `llm.store`)

Each is written aside and renamed, so that a reader sees the old or the new one, whole.
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
"""A first reply that keeps the rules; a second one; neither; no reply after every attempt; not asked yet."""
OUTCOMES: tuple[Outcome, ...] = ("accepted", "repaired", "dropped", "failed", "left")


@dataclass
class Counts:
    """How the tasks of a run ended."""

    by_type: dict[str, Counter[Outcome]] = field(default_factory=dict)
    broken: Counter[str] = field(default_factory=Counter)  # first replies, by the rule that they break
    dropped: Counter[str] = field(default_factory=Counter)  # tasks, by the rule that their last reply breaks

    def add(self, task: Task, outcome: Outcome, end: Needed | Settled | None) -> None:
        """Count one task."""
        self.by_type.setdefault(task.type, Counter())[outcome] += 1
        if isinstance(end, Settled):
            self.broken[end.first or ""] += end.first is not None
            self.dropped[end.reason or ""] += end.reason is not None

    def total(self, outcome: Outcome) -> int:
        """Of all types."""
        return sum(counts[outcome] for counts in self.by_type.values())

    def to_json(self) -> dict[str, Any]:
        """Every count by name; each task has exactly one outcome."""
        return {
            "tasks": sum(counts.total() for counts in self.by_type.values()),
            "rows": self.total("accepted") + self.total("repaired"),
            "outcomes": {outcome: self.total(outcome) for outcome in OUTCOMES},
            "by_type": {type_: {o: counts[o] for o in OUTCOMES} for type_, counts in self.by_type.items()},
            "broken": {rule: n for rule, n in self.broken.most_common() if n},
            "dropped": {rule: n for rule, n in self.dropped.most_common() if n},
        }

    def text(self) -> str:
        """The same for the terminal."""
        head = f"{'':<14}" + "".join(f"{outcome:>10}" for outcome in OUTCOMES)
        lines = [f"{type_:<14}" + "".join(f"{n[o]:>10,}" for o in OUTCOMES) for type_, n in self.by_type.items()]
        for title, rules in (("First replies that broke a rule", self.broken), ("Dropped", self.dropped)):
            said = ", ".join(f"{rule} {n:,}" for rule, n in rules.most_common() if n)
            lines += [f"{title}: {said}"] if said else []
        return "\n".join([head, *lines])


def outcome_of(end: Needed | Settled | None, failed: bool) -> Outcome:
    """The one outcome of a task; None for an end is a fault of it."""
    if end is None:
        return "failed"
    if isinstance(end, Needed):
        return "failed" if failed else "left"
    if end.reason is not None:
        return "dropped"
    return "accepted" if end.first is None else "repaired"


def beside(out: Path, name: str) -> Path:
    """A file that belongs to an output: OUT.calls.jsonl to OUT.json."""
    return out.with_name(f"{out.stem}.{name}.jsonl")


def llava_record(task: Task, turns: Turns) -> dict[str, Any]:
    """An example in LLaVA's form, the image first."""
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
        out: Where the examples go.
        tasks: What the examples are of, in order.
        end_of: The end of a task; None where a fault keeps it from having one, whose reason is then in `failed`.
        failed: The reasons of tasks that failed, by their ids.

    Returns:
        How the tasks ended.

    Raises:
        InputError: A file cannot be written; what stood there before is then still there.
    """
    counts = Counts()
    left_out = beside(out, "left_out")
    start, between, end = ("", "\n", "\n") if out.suffix == ".jsonl" else ("[", ",\n", "]\n")
    try:
        # The examples get their name first: the contexts end in the reverse order.
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
