"""Initial projector of a run with the user's data on nano's parts: from the newest finished nano run.

LoRA starts from zero. The chosen run is written to `run.yaml`, so that a resumed run uses the same one even if a newer
nano run has finished since. If there is none, stage 1 comes first, on nano's own captions.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from qllava.runs import RUNS, Run, finished_nano_runs
from qllava.training.durable import processes
from qllava.training.settings import Settings


def take_projector(settings: Settings, folder: Path) -> None:
    """Set and print `projector` for a run with the user's data on nano's parts, unless it is given.

    Args:
        settings: Settings of the run, which are changed.
        folder: Folder of the run, before its settings are written.
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
        print(f"No nano run in {RUNS}/ can be used, so stage 1 trains the projector first, on nano's captions.")
        return
    settings.model.projector = found
    print(f"Using the projector of the finished nano run {found}; LoRA is newly initialized.")


def _began_with(folder: Path) -> str | None:
    """Return the projector of a run that is resumed."""
    given = Run(folder).read_settings().get("projector")
    return str(given) if given else None


def _newest(folder: Path) -> str | None:
    """Return the nano run that finished last, this folder excluded; raise an InputError if a run cannot be read."""
    others = [run.absolute() for run in finished_nano_runs(RUNS) if run.resolve() != folder.resolve()]
    usable = [run for run in others if not Run(run).is_of_another_nano]
    if others and not usable:
        print(f"The projector of {others[-1]} is not used: the run was trained on another version of nano.")
    return str(usable[-1]) if usable else None
