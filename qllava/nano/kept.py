"""What a part of the builder has reached, kept on the disk, so that a build that was stopped is resumed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from qllava.files import Journal, whole_file

EVERY_S = 300.0
"""Seconds between two states; one takes well under a second to write."""


class Kept:
    """The state of one part, in one file; every name in it is what the part's own rounds put there."""

    def __init__(self, path: Path | None, log: Callable[[str], None]) -> None:
        """Read what an earlier build has left.

        Args:
            path: The file; None keeps nothing.
            log: Prints a line.
        """
        self._path, self._last = path, time.monotonic()
        self.state: dict[str, Any] = {}
        """What was kept last; empty at the beginning."""
        if path is not None and path.is_file():
            self.state = torch.load(
                path, weights_only=False
            )  # our own file: a state of Python's random numbers is in it
            log(f"resuming round {self.state['round'] + 1} at step {self.state['step']}")

    def begins(self, round_: int) -> int | None:
        """Return the step that a round begins at; None for a round that was finished before."""
        reached = self.state.get("round", 0)
        return None if round_ < reached else self.state.get("step", 0) if round_ == reached else 0

    def due(self) -> bool:
        """Whether it is time for the next state."""
        return self._path is not None and time.monotonic() - self._last >= EVERY_S

    def write(self, state: Mapping[str, Any]) -> None:
        """Write a state; it holds `round` and `step`, the number of steps that were done."""
        self._last = time.monotonic()
        if self._path is not None:
            with whole_file(self._path) as aside:
                torch.save(dict(state), aside)


def log_to(path: Path, part: str) -> Callable[[str], None]:
    """Return a function that prints a line, and adds it to a log with the date and the time."""

    def log(line: str) -> None:
        print(f"{part}: {line}", flush=True)
        with Journal(path, durable=False) as journal:
            journal.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n".encode())

    return log
