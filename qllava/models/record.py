"""The record of a base beside its adapter: `qllava.json`, the `Recipe` with its fingerprint."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from qllava.config import InputError
from qllava.models.errors import one_line
from qllava.models.outline import Recipe

RECORD_FILE = "qllava.json"


def save_record(recipe: Recipe, folder: Path) -> None:
    """Write what the model was built from beside its adapter."""
    (folder / RECORD_FILE).write_text(json.dumps(asdict(recipe), indent=2) + "\n", encoding="utf-8")


def read_record(folder: Path) -> Recipe:
    """What the model of a run or checkpoint was built from. Raises InputError when the folder does not say."""
    path = folder / RECORD_FILE
    try:
        return Recipe(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder} is no run of qllava: {path.name} cannot be read ({one_line(error)}).") from error
