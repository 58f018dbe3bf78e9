"""Checkpoints that are complete or absent: sealed with a manifest, found for resuming, and removed when old.

A checkpoint is written under `.partial`, sealed and renamed. The seal is `manifest.json`, written last, after all other
files are on the disk: size and hash of every file, and the settings and data of the run. A run never resumes from a
checkpoint without a manifest or that does not match it, but from the checkpoint before.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from qllava.config import NANO, NANO_IDENTITY, InputError
from qllava.files import Journal, flush, move, os_errors
from qllava.models.errors import one_line
from qllava.runs import BEGUN_FILE, MANIFEST_FILE, PARTIAL, Run
from qllava.training.durable.order import samples_per_step
from qllava.training.options.fields import deciding
from qllava.training.settings import Settings

_OLD = "old-"
"""Prefix, under `.partial`, of a checkpoint that is being replaced by another of the same step."""


@contextmanager
def saving(what: str) -> Iterator[None]:
    """Turn a failure to write into one sentence.

    A full disk is always an OSError in Python: torch raises a RuntimeError, and `os_errors` converts what others raise.
    An error of a GPU or another process while it hands over its weights is not about the disk.

    Raises:
        InputError: Writing failed.
    """
    try:
        with os_errors():
            yield
    except (torch.AcceleratorError, torch.OutOfMemoryError, torch.distributed.DistError):
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(
            f"{what} could not be saved ({one_line(error)}). Earlier checkpoints are unchanged. Free disk space, or "
            "make the folder writable, and run the command again."
        ) from error


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append a line of JSON to a file of the run, or raise an InputError if it cannot be written."""
    with saving(f"{path}"), Journal(path, durable=False) as journal:
        journal.append((json.dumps(row) + "\n").encode())


def begun_with(settings: Settings, **examples: list[dict[str, str]]) -> dict[str, Any]:
    """Return what decides the results of a run: its settings, except the free ones, and the hashes of its examples.

    For a run on nano also which nano: its weights come with qllava, and are other ones in other versions.

    Args:
        settings: Settings of the run.
        examples: For each field, the files in order (`data.hashes_of`), which decides the position of every sample.
            File names are ignored.
    """
    every = {**asdict(settings.model), **asdict(settings.data), **settings.train.to_dict()}  # type: ignore[no-untyped-call]
    chosen = {name: every[name] for name in deciding(every)}
    hashes = {
        f"file {number} of {field}": entry["sha256"]
        for field, files in examples.items()
        for number, entry in enumerate(files, start=1)
    }
    mixture = {"train_file": _mixture(settings.data.train_file), "pretrain_file": _mixture(settings.data.pretrain_file)}
    batch = {"samples_per_step": samples_per_step(settings.train)}
    model = settings.model
    base = {NANO: NANO_IDENTITY} if model.is_nano or NANO in (model.language_model, model.vision_tower) else {}
    return json.loads(json.dumps({**chosen, **batch, **mixture, **hashes, **base}, default=str))  # type: ignore[no-any-return]


def _mixture(given: Any) -> Any:
    """Return how often each file of a mixture is read; the locations of the files are left out."""
    if not isinstance(given, list):
        return None
    return [{k: v for k, v in e.items() if k in ("repeat", "weight")} if isinstance(e, dict) else {} for e in given]


def refuse_changes(folder: Path, begun: Mapping[str, Any]) -> None:
    """Compare with the settings and data of a folder's stage, or of its newest checkpoint.

    Raises:
        InputError: They differ; the message shows how.
    """
    recover(folder)
    for place in (folder, *reversed(Run(folder).checkpoints())):
        try:
            record = place / (BEGUN_FILE if place == folder else MANIFEST_FILE)
            before = json.loads(record.read_text(encoding="utf-8"))["begun_with"]
            differing = sorted(name for name in before.keys() | begun.keys() if before.get(name) != begun.get(name))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # missing or corrupt: `newest` reports it
        if NANO in differing and NANO in begun:
            raise InputError(
                f"{place} was started on another base than the nano of this version of qllava (another version has "
                "other weights). Choose another output_dir, or remove the run's folder to start again."
            )
        if differing:
            shown = [
                f"{name} was {_short(before.get(name))} and is {_short(begun.get(name))}" for name in differing[:5]
            ]
            more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
            raise InputError(
                f"{place} was started with other data or settings: {', '.join(shown)}{more}. Use the original values "
                "to resume it, or choose another output_dir."
            )
        return


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def seal(folder: Path, begun: Mapping[str, Any], optim: str = "", computed: Mapping[str, Any] | None = None) -> None:
    """Flush every file of a folder to the disk, and write its manifest last.

    Args:
        folder: The checkpoint, still under `.partial`.
        begun: Settings and data of the run (`begun_with`).
        optim: Name of the optimizer whose state is saved; one chosen by the memory planner is not in `begun`.
        computed: Choices made during the run that a resumed run must repeat (`LlavaTrainer.computed`).

    Raises:
        OSError: A file cannot be written.
    """
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        flush(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    manifest = folder / MANIFEST_FILE
    content = {"files": files, "begun_with": begun, "optim": optim, "computed": dict(computed or {})}
    manifest.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    flush(manifest)
    flush(folder)


def optim_of(folder: Path) -> str | None:
    """Return the optimizer whose state an intact checkpoint holds; None if it does not say."""
    return json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8")).get("optim") or None


def computed_in(folder: Path) -> dict[str, Any]:
    """Return how the run that wrote an intact checkpoint computed; empty if it does not say."""
    return json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8")).get("computed") or {}


def engine_of(folder: Path) -> tuple[str, int]:
    """Return the engine that saved a checkpoint's optimizer state, "" for transformers, and the number of parts."""
    if (folder / "pytorch_model_fsdp.bin").is_file():
        return "FSDP", 1
    parts = len(list(folder.glob("global_step*/*_optim_states.pt")))
    return ("DeepSpeed", parts) if parts else ("", 1)


def publish(aside: Path, folder: Path) -> None:
    """Rename a sealed checkpoint to its final name; one that has the name already is moved away first.

    The earlier one may be corrupt, or intact: a step can be saved twice (at its interval, and as the best one). If the
    run is killed in between, `recover` restores it.
    """
    old = aside.with_name(f"{_OLD}{aside.name}")
    if folder.exists():
        folder.rename(old)
    try:
        move(aside, folder)
    except OSError:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise


def recover(folder: Path) -> None:
    """Restore intact checkpoints that were moved away for a second save that was killed (see `publish`)."""
    for old in sorted((folder / PARTIAL).glob(f"{_OLD}*")):
        place = folder / old.name.removeprefix(_OLD)
        if not place.exists() and fault(old) is None:
            move(old, place)


def rotate(folder: Path, limit: int | None, passed_over: Collection[Path] = ()) -> None:
    """Keep the newest `limit` checkpoints whose files have the right sizes, and remove older ones.

    The last intact one stays whatever the limit. A folder is renamed before it is removed, so that a killed run leaves
    no half-removed checkpoint under its name.

    Args:
        folder: Folder of the stage.
        limit: Number of checkpoints to keep; None keeps all.
        passed_over: Corrupt checkpoints that were skipped on resume: they do not count and are removed.
    """
    every = [place for place in Run(folder).checkpoints() if place not in passed_over]
    whole = [place for place in every if fault(place, read=False) is None] if limit else []
    older = every[: every.index(whole[-limit:][0])] if limit and whole else []
    for place in (*older, *passed_over):
        going = folder / PARTIAL / place.name
        going.parent.mkdir(exist_ok=True)
        place.rename(going)
        shutil.rmtree(going.parent)


def fault(folder: Path, *, read: bool = True) -> str | None:
    """Return why a checkpoint is not intact, or None; `read` compares every byte instead of sizes only."""
    try:
        files = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {expected['size']:,}"
            if read and _sha256(path) != expected["sha256"]:
                return f"{name} has changed since it was written"
    except FileNotFoundError:
        return f"{MANIFEST_FILE} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({one_line(error)})"
    return None


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest intact checkpoint of a run, and a sentence for each newer one that was skipped."""
    recover(folder)
    skipped: list[str] = []
    for place in reversed(Run(folder).checkpoints()):
        reason = fault(place)
        if reason is None:
            return place, skipped
        skipped.append(f"Skipping the corrupt checkpoint {place}: {reason}.")
    return None, skipped


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
