"""Result of a check, for people and for programs: problems by kind, lengths as a histogram, one verdict."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qllava.data.check import Checked, lengths
from qllava.data.compare import leaked, repeated
from qllava.data.problems import Place, Problem
from qllava.data.table import quantiles

_SHOWN = 3
_BINS = 10
_BAR = 40


@dataclass(frozen=True)
class Verdict:
    """Result of the check of one data set, of one or more files."""

    parts: Sequence[Checked]
    """Files of the data set."""
    evaluation: Sequence[Checked]
    """Held-out files that the data set was compared with."""
    compared: Sequence[Problem]
    """Problems found by comparing examples with each other."""

    @classmethod
    def over(cls, parts: Sequence[Checked], evaluation: Sequence[Checked] = ()) -> Verdict:
        """Compare the examples of all files with each other, and with those of the held-out files."""
        compared: list[Problem] = []
        repeated(parts, compared.append)
        if evaluation:
            leaked(parts, evaluation, compared.append)
        return cls(parts, evaluation, compared)

    def problems(self) -> Iterator[Problem]:
        """Yield the problems of all files."""
        for part in (*self.parts, *self.evaluation):
            yield from part.problems()
        yield from self.compared

    @property
    def ok(self) -> bool:
        """True if every example is learned as it is written, all images can be read, and no answer leaks."""
        failing = sum(part.summary.failing for part in (*self.parts, *self.evaluation))
        return failing == 0 and all(problem.severity == "note" for problem in self.compared)

    @property
    def errors(self) -> int:
        """Number of problems for which a run would fail."""
        return sum(part.summary.errors for part in (*self.parts, *self.evaluation))

    def as_json(self) -> dict[str, Any]:
        """Return the result under the keys that other programs read."""
        summaries = [part.summary for part in self.parts]
        images, shown = sum(s.images for s in summaries), sum(s.shown for s in summaries)
        return {
            "ok": self.ok,
            "samples": sum(s.samples for s in summaries),
            "images": images,
            "problems": [_fields(problem) for problem in self.problems()],
            "tokens": quantiles(np.concatenate([lengths(part) for part in self.parts])),
            "learned_tokens": sum(s.learned_tokens for s in summaries),
            "samples_per_image": round(shown / images, 4) if images else 0.0,
        }

    def text(self, *, verbose: bool = True) -> str:
        """Return a line per file, and problems by kind with the first of each; `verbose` adds histogram and verdict."""
        lines = [_line(part) for part in (*self.parts, *self.evaluation)]
        if verbose:
            lines += ["", *_histogram(self.parts)]
        lines += _by_kind(self.problems())
        if verbose:
            lines += ["", self._verdict()]
        return "\n".join(lines)

    def _verdict(self) -> str:
        if self.ok:
            return "Ready: every example is learned as it is written."
        if self.errors:
            return (
                f"Not ready: {self.errors:,} of these problems {'is an error' if self.errors == 1 else 'are errors'}; "
                "fix them before training."
            )
        return "A run would start, but not every example is learned as it is written, or the evaluation is unreliable."


def _fields(problem: Problem) -> dict[str, Any]:
    return {
        "id": problem.id,
        "file": problem.place.file,
        "line": problem.place.line,
        "row": problem.place.row,
        "kind": problem.kind,
        "severity": problem.severity,
        "problem": problem.problem,
        "hint": problem.hint,
    }


def _line(part: Checked) -> str:
    s = part.summary
    shared = f", each in {s.shown / s.images:.1f} samples" if s.images else ""
    images = f"{s.images:,} image{'s' if s.images != 1 else ''}{shared}"
    tokens = f"tokens median {s.tokens['median']:,}, maximum {s.tokens['max']:,}; " if s.tokens else ""
    file = Place(str(part.path))
    return f"{file}: {s.rows:,} examples, {s.samples:,} samples, {images}; {tokens}learned {s.learned_tokens:,}"


def _histogram(parts: Sequence[Checked]) -> list[str]:
    sizes = np.concatenate([lengths(part) for part in parts])
    if not len(sizes):
        return []
    bins = min(_BINS, len(np.unique(sizes)))
    counts, edges = np.histogram(sizes, bins=bins)
    width = len(f"{edges[-1]:,.0f}")
    return ["Tokens of a sample"] + [
        f"  {low:>{width},.0f} to {high:>{width},.0f}  {'█' * -(-_BAR * int(count) // int(counts.max()))} {count:,}"
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]


def _by_kind(problems: Iterable[Problem]) -> list[str]:
    counts: Counter[str] = Counter()
    first: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        counts[problem.kind] += 1
        if len(first[problem.kind]) < _SHOWN:
            first[problem.kind].append(problem)
    lines: list[str] = []
    order = {"error": 0, "warning": 1, "note": 2}
    for kind in sorted(first, key=lambda k: (order[first[k][0].severity], -counts[k])):
        lines += ["", f"{first[kind][0].severity}: {kind} ({counts[kind]:,})"]
        lines += [f"  {problem}" for problem in first[kind]]
        if counts[kind] > _SHOWN:
            lines.append(f"  ... and {counts[kind] - _SHOWN:,} more; --json lists them all")
    return lines
