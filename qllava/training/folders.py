"""The folder of a run: opening, starting and finishing it. Its files decide whether a run is resumed or refused.

run.yaml, data.json           settings of the run, and hashes of its data files
results.json                  written last; marks the run as finished
"""

from __future__ import annotations

import json
import shlex
import shutil
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from qllava.config import NANO, InputError
from qllava.files import flush, write_whole
from qllava.locks import HIDDEN, locked_folder
from qllava.models.adapter import adapter_at, read_record
from qllava.models.card import write_card
from qllava.models.decided import decided_by
from qllava.nano import dataset as nano
from qllava.runs import DATA_FILE, RESULTS_FILE, RUN_FILE, Run
from qllava.training.data import Part, hashes_of, parts_of
from qllava.training.durable import processes
from qllava.training.durable.checkpoints import begun_with, refuse_changes
from qllava.training.options.before import IN_USE, check_output
from qllava.training.report import write_report
from qllava.training.settings import Settings
from qllava.training.trial import try_out

ABOUT_ADAPTER = (
    "LoRA and projector of a LLaVA, finetuned with qllava. `qllava chat {folder}` uses the base with this adapter, "
    "exactly as trained. `qllava merge {folder} merged` writes a standalone model."
)


def open_folder(settings: Settings, held: ExitStack) -> Path:
    """Create or reopen the run's folder, which is locked for this run until `held` is closed.

    Optimizer and scheduler are tried and the settings of a finished model are applied first, so that no folder is
    created for a run that cannot start.

    Raises:
        InputError: The run cannot start, its folder holds a finished run, or another process is writing to it.
    """
    with processes.together():
        try_out(settings.train)
    settle_model(settings)
    folder = processes.by_main(partial(_opened, settings, held))
    if settings.model.is_nano:
        settings.model.model_name_or_path = NANO
    return folder


def settle_model(settings: Settings) -> None:
    """Take the settings that an existing LLaVA fixes from the model, so that the run records what was really used.

    Raises:
        InputError: The user set one of these settings to another value.
    """
    name = settings.model.model_name_or_path
    parts = settings.model.language_model or settings.model.vision_tower
    if settings.model.is_nano or not name or parts or adapter_at(name):
        return
    for setting, value in processes.main_first(partial(decided_by, name)).items():
        given = getattr(settings.model, setting)
        if setting in settings.explicit and given != value:
            raise InputError(
                f"The setting {setting} is {given}, but the model {name} has {value}, and training cannot change it. "
                "Remove the setting, or build a new LLaVA from language_model and vision_tower."
            )
        setattr(settings.model, setting, value)


def _opened(settings: Settings, held: ExitStack) -> Path:
    folder = Path(str(settings.train.output_dir))
    # The command line was checked for this too; another command may have started or finished here in between.
    given = {
        **asdict(settings.model),
        "output_dir": folder,
        "overwrite_output_dir": settings.train.overwrite_output_dir,
    }
    check_output(given)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked_folder(folder, IN_USE))
        check_output(given)  # the other run may have finished while this one waited for the lock
        if Run(folder).finished:  # an unfinished run is resumed: schedulers repeat the same command
            _clear(folder)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise InputError(f"The run cannot be written to {folder}: {error.strerror or error}.") from error
    return folder


def _clear(folder: Path) -> None:
    """Remove a finished run; delete results.json last, so that a partly removed run is never resumed."""
    results, settings = folder / RESULTS_FILE, folder / RUN_FILE
    for path in folder.iterdir():
        if path in (results, settings) or path.name in HIDDEN:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    results.unlink()


def begin(settings: Settings, folder: Path, files: list[Part], held_out: list[Part]) -> dict[str, Any]:
    """Return what decides the results of a finetune run, in both stages, and write `data.json` and `run.yaml`.

    `data.json` has the hashes of the example files, which model cards name.

    Raises:
        InputError: A checkpoint of the run has other values.
    """
    hashes, pretrain_file = hashes_of(files), settings.data.pretrain_file
    captions = hashes_of(parts_of(pretrain_file, images(settings), "pretrain_file")) if pretrain_file else []
    begun = begun_with(settings, train_file=hashes, pretrain_file=captions)
    for place in (Run(folder).stage1.folder, folder):
        refuse_changes(place, begun)
    write_whole(folder / DATA_FILE, json.dumps([*hashes, *hashes_of(held_out)], indent=2) + "\n")
    write_settings(settings, folder)
    return begun


def write_settings(settings: Settings, folder: Path) -> None:
    """Write `run.yaml`, the settings of the run."""
    resolved = {**asdict(settings.model), **asdict(settings.data), **settings.train.to_dict()}  # type: ignore[no-untyped-call]
    write_whole(folder / RUN_FILE, yaml.safe_dump(_plain(resolved), sort_keys=False))


def _plain(value: Any) -> Any:
    """Return the value in types that every YAML reader knows."""
    return json.loads(json.dumps(value, default=str))


def images(settings: Settings) -> Path | None:
    """Return the setting `image_folder` as a path."""
    return Path(settings.data.image_folder) if settings.data.image_folder else None


def files_of(given: Any, settings: Settings, field: str, *, nano_file: str) -> list[Part]:
    """Return the files of a setting, or nano's own if none is given and the parts are nano's."""
    if given is not None:
        return parts_of(given, images(settings), field)
    if not settings.model.is_nano:
        raise InputError(f"The setting {field} is missing. Give a file of examples (only nano has default data).")
    data = processes.main_first(nano.prepare)
    return [Part(getattr(data, nano_file), data.folder)]


def held_out(settings: Settings, *, stage1: bool = False) -> list[Part]:
    """Return the held-out files of a run; nano's own are used in stage 2, with nano's own training examples."""
    if settings.data.eval_file:
        return parts_of(settings.data.eval_file, images(settings), "eval_file")
    if settings.nanos_own and not stage1:
        data = nano.prepare()
        return [Part(data.validation, data.folder)]
    return []


def finish(folder: Path, results: dict[str, Any]) -> None:
    """Write report, card and results; `results.json` comes last, because it marks the run as finished.

    If the process is killed before that, the same command resumes the run; if it is killed later, all files are already
    on the disk, even after a power failure.
    """
    write_report(folder, results)
    if adapter_at(str(folder)):
        about = [ABOUT_ADAPTER.format(folder=shlex.quote(folder.name))]
        write_card(folder, folder, read_record(folder), "peft", about, results)
    for path in folder.iterdir():
        if path.is_file():
            flush(path)
    write_whole(folder / RESULTS_FILE, json.dumps(results, indent=2) + "\n")


def say_next(done: str, commands: list[str]) -> None:
    """Print the result and the commands that can follow."""
    print(f"\n{done}\nNext:")
    for command in commands:
        print(f"  {command}")
