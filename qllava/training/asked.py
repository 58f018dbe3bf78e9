"""Selection of held-out questions: evenly spaced during the run, drawn with the seed at its end.

Only examples that became complete samples are used. An example that was dropped as too long may have a prompt that
exceeds the model's context, and one that was trimmed has lost its last question.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from qllava.data.check import Checked, numbers
from qllava.data.formats import Example, read_these
from qllava.data.records import read_records
from qllava.training.data import Part, Prepared


class HeldOut:
    """Held-out examples that can be asked as questions, by their numbers in their files."""

    def __init__(self, parts: Sequence[Part], prepared: Prepared | None) -> None:
        """Find the examples.

        Args:
            parts: The held-out files.
            prepared: Their samples, or None if no examples are held out.
        """
        self.parts = parts if prepared else ()
        self.rows = (
            [_askable(part, found) for part, found in zip(parts, prepared.parts, strict=True)] if prepared else []
        )

    def spaced(self, count: int) -> list[Example]:
        """Return at most `count` examples, evenly spaced, about the same number from each file."""
        if not self.parts or not count:
            return []
        each = -(-count // len(self.parts))
        return self._read([rows[:: max(1, -(-len(rows) // each))] for rows in self.rows])

    def drawn(self, count: int, seed: int) -> list[Example]:
        """Return at most `count` examples, drawn over all files with the seed."""
        every = [(part, number) for part, rows in enumerate(self.rows) for number in rows]
        places = random.Random(seed).sample(range(len(every)), min(count, len(every)))
        chosen: list[list[int]] = [[] for _ in self.rows]
        for part, number in (every[place] for place in places):
            chosen[part].append(number)
        return self._read(chosen)

    def _read(self, chosen: Sequence[Sequence[int]]) -> list[Example]:
        """Return the examples with the given numbers of each file, in the order of the files."""
        pairs = zip(self.parts, chosen, strict=True)
        return [e for part, wanted in pairs if wanted for e in read_these(part.path, part.image_folder, set(wanted))]


def _askable(part: Part, found: Checked) -> Sequence[int]:
    """Return the numbers, from 0, of a file's examples that became whole samples."""
    trimmed = {
        (Path(p.place.file).name, p.place.line or 0, p.place.row or 0) for p in found.problems() if p.kind == "trimmed"
    }
    if not trimmed and found.summary.samples == found.summary.rows:
        return range(found.summary.rows)
    table = found.table
    files = (Path(str(name)).name for name in table.data.column("file").to_pylist())
    # Samples are in the order of their examples. Paths are compared by name: the cache may hold another spelling.
    places = zip(files, numbers(table, "line").tolist(), numbers(table, "row").tolist(), strict=True)
    expected = next(places, None)
    rows = []
    for number, (place, _) in enumerate(read_records(part.path)):
        if expected is None:
            break
        if (Path(place.file).name, place.line or 0, place.row or 0) == expected:
            if expected not in trimmed:
                rows.append(number)
            expected = next(places, None)
    return rows
