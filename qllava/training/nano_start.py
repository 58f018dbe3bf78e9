"""Initial projector of a run with own data on nano's parts: from the newest finished nano run.

LoRA starts from zero. Which run was taken is written to `run.yaml`, so that a resumed run takes the same one when a
newer nano run has finished since. Where there is none, stage 1 comes first, on nano's own captions.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from qllava.runs import RUNS, Run, finished_nano_runs
from qllava.training.durable import processes
from qllava.training.settings import Settings


def take_projector(settings: Settings, folder: Path) -> None:
    """Set `projector` for a run of own data on nano's parts that gives none, and say which; see the head of this file.

    folder: the run's, before its settings are written.
    """
    if not (settings.model.is_nano and settings.data.train_file):
        return
    if settings.model.projector or settings.data.pretrain_file:
        return
    resumed = processes.by_main(lambda: Run(folder).state == "interrupted")
    found = processes.by_main(partial(_began_with if resumed else _newest, folder))
    if found is None and resumed:
        print("Using the projector of this run's own stage 1, as before.")
        return
    if found is None:
        print(f"No nano run in {RUNS}/ is finished, so stage 1 trains the projector first, on nano's captions.")
        return
    settings.model.projector = found
    print(f"Using the projector of the finished nano run {found}; LoRA is newly initialized.")


def _began_with(folder: Path) -> str | None:
    """The projector of a run that is resumed."""
    given = Run(folder).read_settings().get("projector")
    return str(given) if given else None


def _newest(folder: Path) -> str | None:
    """The nano run that finished last, but for the folder itself. Raises InputError when a run cannot be read."""
    others = [run.absolute() for run in finished_nano_runs(RUNS) if run.resolve() != folder.resolve()]
    return str(others[-1]) if others else None
