"""Locating the base model of a run, which may have moved since the run recorded its location.

    located(Path("runs/mine"))                                  at the recorded location
    located(Path("runs/mine"), ["/new/llava-1.5-7b-hf"])        at the location given with `--base-model`

The config.json of a given folder decides which part the folder replaces. The
fingerprint is compared when the base is read (`outline.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from qllava.config import InputError, expanded
from qllava.models.hub import HubError
from qllava.models.language import LANGUAGE_MODELS
from qllava.models.record import Recipe, read_record
from qllava.models.towers import KINDS

FLAG = "--base-model DIR"
_PARTS = {"model": "LLaVA", "language_model": "language model", "vision_tower": "vision tower"}


def located(run: Path, base_model: str | Path | Sequence[str | Path] = ()) -> Recipe:
    """Return the recipe of a run's or checkpoint's base, with the current locations of its parts.

    Args:
        run: The folder of a run or checkpoint.
        base_model: New locations of parts of its base: one folder, or several.

    Raises:
        InputError: If the run has no record of its base, a part has moved, or a given folder is not a part
            of its base.
    """
    record = read_record(run)
    given = [base_model] if isinstance(base_model, str | Path) else list(base_model)
    for one in given:
        part, place = _part_of(one), expanded(str(one))
        if getattr(record, part) is None:
            built = ", ".join(_PARTS[own] for own in _PARTS if getattr(record, own) is not None)
            raise InputError(
                f"{one} is a {_PARTS[part]}, but {run} was built from: {built}. Use {FLAG} only for these parts."
            )
        if not place.startswith("open_clip:"):
            place = str(Path(place).absolute())
        record = replace(record, **{part: place})  # type: ignore[arg-type]  # the three parts are strings
    for part, called in _PARTS.items():
        place = getattr(record, part)
        if place is not None and Path(place).is_absolute() and not Path(place).is_dir():
            raise InputError(
                f"The base of {run} has moved: its {called} {place} does not exist. Give the new location with "
                f"{FLAG}; its fingerprint is checked."
            )
    return record


@contextmanager
def at_its_base(run: Path) -> Iterator[None]:
    """Add the advice to use `--base-model` to an error about the base of a run."""
    try:
        yield
    except HubError as error:
        raise InputError(
            f"The base of {run}: {str(error).rstrip('.')}; or give the base's folder with {FLAG}."
        ) from error


def _part_of(folder: str | Path) -> str:
    """Return which part of a LLaVA a folder holds; raise InputError if it holds none."""
    if str(folder).startswith("open_clip:"):
        return "vision_tower"
    path = Path(expanded(str(folder))) / "config.json"
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"{folder} is not a base model ({path} cannot be read). Give the folder of the base model with {FLAG}."
        ) from error
    if kind == "llava":
        return "model"
    if kind in LANGUAGE_MODELS:
        return "language_model"
    if kind in KINDS:
        return "vision_tower"
    raise InputError(
        f"{folder} is a model of type '{kind}', which is not part of a LLaVA. Give another folder with {FLAG}."
    )
