"""Parsing and formatting of memory sizes; 1 GB is 2**30 bytes, as in the sizes of GPUs."""

from __future__ import annotations

import re

from qllava.config import InputError

GB = 1 << 30
CARDS = (4, 6, 8, 12, 16, 24, 32, 48, 80)
"""Common memory sizes of GPUs, in GB."""


def parse_bytes(text: str) -> int:
    """Convert `12GB`, `7.5 GiB` or `900MB` into bytes, all in binary units; raise InputError for other text."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([GM])(?:i?B)?\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise InputError(f"The memory size {text!r} cannot be read. Write it like 12GB or 900MB.")
    return int(float(found[1]) * (GB if found[2].upper() == "G" else 1 << 20))


def check_bytes(text: str, what: str) -> None:
    """Raise InputError if a setting or flag is not a memory size."""
    try:
        parse_bytes(text)
    except InputError as error:
        raise InputError(f"{what}: {error}") from error


def format_bytes(size: float) -> str:
    """Format bytes as `7.4 GB`, or below 1 GB as `12.3 MB`."""
    return f"{size / GB:.1f} GB" if size >= GB else f"{size / (1 << 20):.1f} MB"
