"""Writes the checkpoints of a stage: aside, sealed, renamed, and the older ones cleared away.

What is in a checkpoint comes from elsewhere (`contents.py` and transformers); that it is there whole or not at all is
decided here, with the functions of `checkpoints.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from qllava.runs import PARTIAL, Run
from qllava.training.durable import processes
from qllava.training.durable.checkpoints import publish, rotate, saving, seal


class CheckpointWriter:
    """The checkpoints of one stage, as far as this start of the run writes them."""

    passed_over: Sequence[Path] = ()
    """Checkpoints that are not intact: the run resumes from one before them, and they go when the next is saved."""
    aside: Path | None = None
    """Where the files of a checkpoint go while it is being written; None at all other times."""
    step = 0
    """The step that was saved last, or resumed from."""

    def __init__(self, folder: Path, begun_with: Mapping[str, Any]) -> None:
        """Write nothing yet.

        Args:
            folder: Of the stage.
            begun_with: What decides the run; every checkpoint's manifest keeps it.
        """
        self._folder, self._begun_with = folder, begun_with

    def write(
        self,
        step: int,
        save: Callable[[], None],
        *,
        optim: str = "",
        computed: Mapping[str, Any] | None = None,
        limit: int | None = None,
        waiting: bool = False,
    ) -> None:
        """Write the checkpoint of a step; called in all processes.

        Args:
            step: The optimizer step that it is saved after.
            save: Writes the files into `aside` / checkpoint-STEP.
            optim: Name of the optimizer whose state is saved.
            computed: What was settled during the run, see `seal`.
            limit: How many checkpoints are kept; None: all.
            waiting: The processes wait for each other inside `save`, so that one that fails ends on its own.

        Raises:
            InputError: The checkpoint cannot be written; earlier ones are untouched.
        """
        place = Run(self._folder).checkpoint(step)
        aside, name = self._folder / PARTIAL, place.name
        self.aside = aside

        def whole() -> None:
            with saving(f"The checkpoint {place}"):
                seal(aside / name, self._begun_with, optim, computed)
                publish(aside / name, place)

        try:
            processes.by_main(partial(shutil.rmtree, aside, ignore_errors=True))
            # Each process has a random state of its own to save; the seal is for all that they wrote.
            with nullcontext() if waiting else processes.together(), saving(f"The checkpoint {place}"):
                save()
            processes.by_main(whole)
        finally:
            self.aside = None
            if processes.is_main():
                shutil.rmtree(aside, ignore_errors=True)
        gone = [passed for passed in self.passed_over if passed != place]
        processes.by_main(partial(rotate, self._folder, limit, gone))
        self.step, self.passed_over = step, ()
