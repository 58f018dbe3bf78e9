"""Writing of a stage's checkpoints: in a temporary folder, sealed, renamed; older ones are removed.

The files of a checkpoint come from `contents.py` and transformers; this module ensures, with the functions of
`checkpoints.py`, that a checkpoint is complete or absent.
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
    """Writer of the checkpoints of one stage."""

    passed_over: Sequence[Path] = ()
    """Checkpoints that are not intact: the run resumes from an earlier one, and they are removed at the next save."""
    aside: Path | None = None
    """Folder for the files of a checkpoint while it is being written; None at all other times."""
    step = 0
    """The step that was saved last, or from which the run was resumed."""

    def __init__(self, folder: Path, begun_with: Mapping[str, Any]) -> None:
        """Start without writing anything.

        Args:
            folder: Folder of the stage.
            begun_with: Settings and data of the run, which every manifest records.
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
        """Write the checkpoint of a step; called on all ranks.

        Args:
            step: The optimizer step after which it is saved.
            save: Writes the files into `aside` / checkpoint-STEP.
            optim: Name of the optimizer whose state is saved.
            computed: Choices made during the run, see `seal`.
            limit: Number of checkpoints to keep; None keeps all.
            waiting: Whether the ranks wait for each other inside `save`, so that a rank that fails must end alone.

        Raises:
            InputError: The checkpoint cannot be written; earlier ones are unchanged.
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
            # Each rank saves its own random state; the seal covers the files of all.
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
