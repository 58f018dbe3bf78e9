"""Cases of broken data sets: their content, and the message that the user reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HUMAN = {"from": "human", "value": "What is it?"}
SEEN = {"from": "human", "value": "<image>\nWhat is it?"}
GPT = {"from": "gpt", "value": "A bus."}
SOUND = {"id": "a1", "image": "red.png", "conversations": [SEEN, GPT]}

DOCS = "see the formats in docs/data.md"
FORM = "a data file is a JSON list of examples, or one example per line"
FORMATS = (
    "a data file is a JSON list of examples, one example per line, a table (CSV), Parquet, Arrow or a WebDataset tar"
)
HALF = "contains half of a character (a \\u escape of a surrogate without its partner); write the complete character"
REPLACE = "replace it, or remove its examples"


@dataclass(frozen=True)
class Case:
    """A broken data set."""

    content: list[Any] | str | bytes | Callable[[Path], object]
    """Examples of a JSON list (one per line), the text or bytes of the data file, or a function that writes it."""
    said: str
    """Expected message; {folder} is the folder of the file."""
    id: str | None = None
    """Id of the example in machine-readable output."""
    line: int | None = None
    """Line of the problem in machine-readable output."""
    samples: int = 0
    """Number of examples without an error."""
    file: str = "train.json"
    """Name of the data file."""
    severity: str = "error"
    """Severity of the problem."""


def row(said: str, *turns: Any, id: Any = "x7", where: str = "id x7", **more: Any) -> Case:
    """Return a case of a broken LLaVA example that follows a sound one."""
    broken = {"conversations": list(turns), **more} | ({} if id is None else {"id": id})
    return raw(said, broken, where=where)


def raw(said: str, broken: Any, *, where: str = "id x7") -> Case:
    """Return a case of any broken example that follows a sound one; `where` is empty if its id cannot be read."""
    place = f"train.json, example 2, {where}" if where else "train.json, example 2"
    id = where.removeprefix("id ") or None
    return Case([SOUND, broken], f"{place}: {said}.", id=id, line=3, samples=1)


def lines(rows: list[Any]) -> str:
    return "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"
