"""Whole checkpoints: sealed with a manifest, found again, cleared away.

A checkpoint is written under `.partial`, sealed and renamed. The seal is `manifest.json`, written last, when all else
is on the disk: size and hash of every file, and what the run was begun with. A folder without it, or that it does not
fit, is never continued from; the one before is.
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

from qllava.config import InputError
from qllava.files import Journal, flush, move, os_errors
from qllava.models.errors import one_line
from qllava.runs import BEGUN_FILE, MANIFEST_FILE, PARTIAL, Run
from qllava.training.durable.order import samples_per_step
from qllava.training.options.fields import deciding
from qllava.training.settings import Settings

_OLD = "old-"
"""Before the name of a checkpoint, under `.partial`, that makes way for another of the same step."""


@contextmanager
def saving(what: str) -> Iterator[None]:
    """Turn a failure to write into one sentence.

    A full disk is an OSError to Python alone: torch raises a RuntimeError, and `os_errors` converts what others raise.
    What a GPU or another process raises while it hands over its weights is not about the disk.
    """
    try:
        with os_errors():
            yield
    except (torch.AcceleratorError, torch.OutOfMemoryError, torch.distributed.DistError):
        raise
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{what} could not be saved ({one_line(error)}). Earlier checkpoints are unchanged. Free disk space, or "
            "make the folder writable, and run the command again."
        ) from error


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line of JSON to a file of the run. Raises InputError when it cannot be written."""
    with saving(f"{path}"), Journal(path, durable=False) as journal:
        journal.append((json.dumps(row) + "\n").encode())


def begun_with(settings: Settings, **examples: list[dict[str, str]]) -> dict[str, Any]:
    """What decides a run: its settings but for the free ones, and the hashes of its examples.

    examples: of each field, the files in their order (`data.hashes_of`), which decides the place of every sample.
    The names of the files decide nothing.
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
    return json.loads(json.dumps({**chosen, **batch, **mixture, **hashes}, default=str))  # type: ignore[no-any-return]


def _mixture(given: Any) -> Any:
    """How often each file of a list is read; where they are is left out."""
    if not isinstance(given, list):
        return None
    return [{k: v for k, v in e.items() if k in ("repeat", "weight")} if isinstance(e, dict) else {} for e in given]


def refuse_changes(folder: Path, begun: Mapping[str, Any]) -> None:
    """Compare with what a folder's stage, or its newest checkpoint, was begun with.

    Raises InputError that shows the difference.
    """
    recover(folder)
    for place in (folder, *reversed(Run(folder).checkpoints())):
        try:
            record = place / (BEGUN_FILE if place == folder else MANIFEST_FILE)
            before = json.loads(record.read_text(encoding="utf-8"))["begun_with"]
            differing = sorted(name for name in before.keys() | begun.keys() if before.get(name) != begun.get(name))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # not there, or not whole: `newest` says so
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
    """Bring every file of a folder to the disk, and write its manifest last. Raises OSError when that fails.

    optim: which optimizer's state is saved; one that memory has chosen is not in `begun`.
    computed: what was settled during the run and is used again on resume (`LlavaTrainer.computed`).
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
    """The optimizer whose state a whole checkpoint holds; None where it does not say."""
    return json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8")).get("optim") or None


def computed_in(folder: Path) -> dict[str, Any]:
    """What the run that wrote a whole checkpoint had settled about how it computes; empty where it does not say."""
    return json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8")).get("computed") or {}


def engine_of(folder: Path) -> tuple[str, int]:
    """What besides transformers saved the optimizer's state of a checkpoint, and in how many parts; "" for nothing."""
    if (folder / "pytorch_model_fsdp.bin").is_file():
        return "FSDP", 1
    parts = len(list(folder.glob("global_step*/*_optim_states.pt")))
    return ("DeepSpeed", parts) if parts else ("", 1)


def publish(aside: Path, folder: Path) -> None:
    """Give a sealed checkpoint its name; one that has the name already makes way first.

    The earlier one may be corrupt, or intact: a step can be saved twice (at its interval, and as the best one). A run
    that is killed in between gets it back from `recover`.
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
    """Give intact checkpoints their names back that had made way for a second save which was killed (`publish`)."""
    for old in sorted((folder / PARTIAL).glob(f"{_OLD}*")):
        place = folder / old.name.removeprefix(_OLD)
        if not place.exists() and fault(old) is None:
            move(old, place)


def rotate(folder: Path, limit: int | None, passed_over: Collection[Path] = ()) -> None:
    """Keep the newest `limit` checkpoints that are whole by their sizes; what is older than these goes.

    passed_over: those that the run was not continued from, because they were not whole: they do not count, and go. The
    last whole one stays whatever the limit, and a folder is renamed before it is removed: killed in between, none is
    left half under its name.
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
    """Why a checkpoint is not whole; None when it is. `read`: compare every byte, and not sizes alone."""
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
    """The newest whole checkpoint of a run, and a sentence for each newer one that was skipped."""
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
