"""Where the base of a run is now: its record says where it was, and a folder may have moved.

    located(Path("runs/mine"))                                  as the record says
    located(Path("runs/mine"), ["/new/llava-1.5-7b-hf"])        where `--base-model` says it is

Each folder takes the place of the part that its config.json says it is. Whether it is the same base is found by its
fingerprint, when it is read (`outline.py`).
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
    """What the model of a run or checkpoint was built from, with its parts where they are now.

    Args:
        run: The folder of a run or checkpoint.
        base_model: Where parts of its base are now: one folder, or several.

    Raises:
        InputError: The run does not say what it was built from, a part is not where it was, or a given folder is not a
            part of its base.
    """
    record = read_record(run)
    given = [base_model] if isinstance(base_model, str | Path) else list(base_model)
    for one in given:
        part, place = _part_of(one), expanded(str(one))
        if getattr(record, part) is None:
            built = ", ".join(_PARTS[own] for own in _PARTS if getattr(record, own) is not None)
            raise InputError(f"{one} is a {_PARTS[part]}, and {run} was built from: {built}; give {FLAG} for these.")
        if not place.startswith("open_clip:"):
            place = str(Path(place).absolute())
        record = replace(record, **{part: place})  # type: ignore[arg-type]  # the three parts are strings
    for part, called in _PARTS.items():
        place = getattr(record, part)
        if place is not None and Path(place).is_absolute() and not Path(place).is_dir():
            raise InputError(
                f"The base of {run} is not there any more: its {called} was {place}; say where it is now with {FLAG} "
                "(that it is the same one is checked)."
            )
    return record


@contextmanager
def at_its_base(run: Path) -> Iterator[None]:
    """Name the flag where the base of a run cannot be fetched. Raises InputError."""
    try:
        yield
    except HubError as error:
        raise InputError(f"The base of {run}: {str(error).rstrip('.')}; or give it as a folder with {FLAG}.") from error


def _part_of(folder: str | Path) -> str:
    """Which part of a LLaVA a folder holds. Raises InputError when it is none."""
    if str(folder).startswith("open_clip:"):
        return "vision_tower"
    path = Path(expanded(str(folder))) / "config.json"
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"{folder} is not a base model ({path} cannot be read); give its folder with {FLAG}."
        ) from error
    if kind == "llava":
        return "model"
    if kind in LANGUAGE_MODELS:
        return "language_model"
    if kind in KINDS:
        return "vision_tower"
    raise InputError(f"{folder} is a model of type '{kind}', which is not part of a LLaVA; give another {FLAG}.")
