"""Measurements of a finetune run besides the held-out loss: answers before and after training, and nano's table."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from qllava.data.formats import Example
from qllava.models.assemble import Assembled
from qllava.training import samples, scores
from qllava.training.asked import HeldOut
from qllava.training.durable import processes
from qllava.training.settings import Settings


class Measures:
    """Measurements of one run, in the order in which they are made."""

    def __init__(self, settings: Settings, folder: Path, assembled: Assembled) -> None:
        """Start without measurements.

        Args:
            settings: Settings of the run.
            folder: Folder of the run.
            assembled: The model's parts, for its tokenizer and its template.
        """
        self._folder, self._assembled = folder, assembled
        # One `Room` for all answers, so that a batch size that does not fit is tried only once.
        self._room = scores.room_for(settings.train)
        self.table = scores.Table.open(folder, assembled, self._room) if settings.nanos_own else None
        """nano's table, if the run trains on nano's own examples; None otherwise."""
        self._count = scores.shown(settings.train)
        self._shown: list[Example] = []
        self._before: Sequence[str | None] = ()
        self._after: Sequence[str] = ()

    def add(self, name: str, model: nn.Module) -> None:
        """Measure a record of the table, if there is one, with the model in its current state."""
        if self.table:
            self.table.measure(name, model)

    def before(self, model: nn.Module, asked: HeldOut) -> None:
        """Answer the report's questions before the first step."""
        self._shown = asked.spaced(self._count)
        self._before = samples.before(self._folder, model, self._assembled, self._shown, self._room)

    def after(self, model: nn.Module) -> dict[str, Any]:
        """Answer the same questions with the trained model, and return its table for results.json."""
        self._after = scores.answers(model, self._assembled, self._shown, self._room) if self._shown else []
        return self.table.finish(model) if self.table else {}

    def write(self) -> None:
        """Write the answers for the report; called on all ranks."""
        processes.by_main(partial(samples.write, self._folder, self._shown, self._before, self._after))
