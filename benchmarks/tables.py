"""Tables of results as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def format_table(lines: Sequence[dict[str, Any]]) -> str:
    """Return lines with the same keys as a Markdown table."""
    rows = [[_cell(value) for value in line.values()] for line in lines]
    head = [name.replace("_", " ") for name in lines[0]]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(_cell(entry) for entry in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
