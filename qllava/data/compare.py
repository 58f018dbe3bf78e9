"""Comparison of examples by the hashes in their tables: duplicates, ids used twice, and leaks into the evaluation.

Several files are one data set: examples are compared across them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qllava.data.check import Checked, numbers
from qllava.data.problems import OnProblem, Place, Problem


def repeated(parts: Sequence[Checked], on_problem: OnProblem) -> None:
    """Report examples that occur twice in one data set, and ids that name two different examples.

    Several examples about one image may have its id, as LLaVA's own do, but not if their text is the same.

    Args:
        parts: Files of the data set.
        on_problem: Called with each problem.
    """
    where = _Records(parts)
    contents, ids, shown = (where.column(name) for name in ("content_hash", "id_hash", "images_hash"))
    order = np.lexsort((np.arange(len(contents)), contents))
    same = order[1:][contents[order[1:]] == contents[order[:-1]]]
    first_of = _firsts(contents, order)
    for index in np.sort(same):
        earlier = where.place(first_of[contents[index]])
        problem = f"the example has the same text and the same images as {earlier}"
        on_problem(where.problem(index, "duplicate", problem, "remove one, unless it should count twice", "note"))
    order = np.lexsort((np.arange(len(ids)), ids))
    first_of = _firsts(ids, order)
    for index in np.sort(order[1:][(ids[order[1:]] == ids[order[:-1]]) & (ids[order[1:]] != 0)]):
        first = first_of[ids[index]]
        about_one_image = shown[index] == shown[first] != 0 and contents[index] != contents[first]
        if not about_one_image:
            problem = f"{where.place(first)} has the same id"
            on_problem(where.problem(index, "duplicate id", problem, "give each example an id of its own", "warning"))


def _firsts(values: np.ndarray, order: np.ndarray) -> dict[int, int]:
    """Return the first index of each value that occurs twice; `order` sorts the values, equal ones by index."""
    ordered = values[order]
    again = np.flatnonzero(ordered[1:] == ordered[:-1])
    starts = again[np.concatenate([[True], ordered[again[1:]] != ordered[again[:-1]]])] if len(again) else again
    return {int(values[order[k]]): int(order[k]) for k in starts}


def leaked(parts: Sequence[Checked], evaluation: Sequence[Checked], on_problem: OnProblem) -> None:
    """Report examples that contain a question of the evaluation examples with the same images and the same answer."""
    held_out = np.concatenate([numbers(part.table, "round_hashes") for part in evaluation])
    for part in parts:
        offset = 0
        where = _Records([part])
        for chunk in part.table.data.column("round_hashes").chunks:
            owner = np.repeat(np.arange(len(chunk)), chunk.value_lengths().to_numpy(zero_copy_only=False))
            found = np.isin(chunk.flatten().to_numpy(zero_copy_only=False), held_out)
            for index in np.unique(owner[found]):
                problem = "a question with its images and answer is in the evaluation file too"
                hint = "remove it from one of the two, or the evaluation measures memorized answers"
                on_problem(where.problem(offset + int(index), "in the evaluation", problem, hint, "warning"))
            offset += len(chunk)


class _Records:
    """Examples of several tables under one numbering."""

    def __init__(self, parts: Sequence[Checked]) -> None:
        self.tables = [part.table for part in parts]
        self.starts = np.cumsum([0, *(len(table) for table in self.tables)])

    def column(self, name: str) -> np.ndarray:
        return np.concatenate([numbers(table, name) for table in self.tables])

    def _record(self, index: int) -> tuple[dict[str, Any], Place]:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        record = self.tables[part][int(index - self.starts[part])]
        return record, Place(record["file"], record["line"], record["row"])

    def place(self, index: int) -> Place:
        return self._record(index)[1]

    def problem(self, index: int, kind: str, problem: str, hint: str, severity: Any) -> Problem:
        record, place = self._record(index)
        return Problem(kind, problem, hint, place, record["id"], severity)
