"""Shapes of the models that presets name, so that a plan needs no network; taken from their config.json.

`known.json` has them by their names on the hub: the sizes published by the models' authors, and only values that decide
shapes and memory.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig

_FILE = Path(__file__).with_name("known.json")


def known_config(name: str) -> Any:
    """Return a new config of a model by its name on the hub; None if the name is not known."""
    values = _known().get(name)
    if values is None:
        return None
    fields: dict[str, Any] = copy.deepcopy(values)
    return AutoConfig.for_model(str(fields.pop("model_type")), **fields)


@cache
def _known() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(_FILE.read_text(encoding="utf-8"))
    return found
