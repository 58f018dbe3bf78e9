"""Amounts of memory as people write them. GB are 2**30 bytes here, as cards are sold."""

from __future__ import annotations

import re

from qllava.config import InputError

GB = 1 << 30
CARDS = (4, 6, 8, 12, 16, 24, 32, 48, 80)
"""GB that cards are sold with."""


def parse_bytes(text: str) -> int:
    """`12GB`, `7.5 GiB` or `900MB` in bytes, binary units all of them. Raises InputError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([GM])(?:i?B)?\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise InputError(f"The amount of memory {text!r} cannot be read; write it as 12GB or 900MB.")
    return int(float(found[1]) * (GB if found[2].upper() == "G" else 1 << 20))


def check_bytes(text: str, what: str) -> None:
    """Raise InputError when a setting or flag is not an amount of memory."""
    try:
        parse_bytes(text)
    except InputError as error:
        raise InputError(f"{what}: {error}") from error


def format_bytes(size: float) -> str:
    """`7.4 GB`; below one GB `12.3 MB`."""
    return f"{size / GB:.1f} GB" if size >= GB else f"{size / (1 << 20):.1f} MB"
