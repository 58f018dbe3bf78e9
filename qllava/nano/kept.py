"""The state of a part that is being built, kept on the disk, so that a stopped build can be resumed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from qllava.config import InputError
from qllava.files import Journal, whole_file

EVERY_S = 300.0
"""Seconds between two states; one takes well under a second to write."""


class Kept:
    """The state of one part, in one file. The part's own rounds choose its keys."""

    def __init__(self, path: Path | None, log: Callable[[str], None], begun: str = "") -> None:
        """Read the state of an earlier start, if there is one.

        Args:
            path: The file; None keeps nothing.
            log: Called with a line if training is resumed.
            begun: Seed and rounds in words; a state of others is refused.

        Raises:
            InputError: The state was begun with another seed or other rounds.
        """
        self._path, self._last, self._begun = path, time.monotonic(), begun
        self.state: dict[str, Any] = {}
        """The state that was kept last; empty at the beginning."""
        if path is not None and path.is_file():
            self.state = torch.load(path, weights_only=True)
            if self.state["begun"] != begun:
                raise InputError(
                    f"{path} is of a build with another seed or other rounds ({self.state['begun']}; now {begun}). Use "
                    "the same ones to resume it, or another --out."
                )
            log(f"resuming round {self.state['round'] + 1} at step {self.state['step']}")

    def begins(self, round_: int) -> int | None:
        """Return the first step of a round; None if the round is finished."""
        reached = self.state.get("round", 0)
        return None if round_ < reached else self.state.get("step", 0) if round_ == reached else 0

    def due(self) -> bool:
        """Whether it is time for the next state."""
        return self._path is not None and time.monotonic() - self._last >= EVERY_S

    def write(self, state: Mapping[str, Any]) -> None:
        """Write a state; its keys include `round` and `step`, the number of steps that were done."""
        self._last = time.monotonic()
        if self._path is not None:
            with whole_file(self._path) as aside:
                torch.save({**state, "begun": self._begun}, aside)


def log_to(path: Path, part: str) -> Callable[[str], None]:
    """Return a function that prints a line, and appends it with date and time to a log."""

    def log(line: str) -> None:
        print(f"{part}: {line}", flush=True)
        with Journal(path, durable=False) as journal:
            journal.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n".encode())

    return log
