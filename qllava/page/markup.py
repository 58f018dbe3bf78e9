"""The two things that all parts of a page share: the type of markup, and how a number is written."""

from __future__ import annotations

import math

from markupsafe import Markup

Html = Markup
"""Markup that a function of this package made; a plain `str` is text, and is escaped wherever markup is built."""


def number(value: float) -> str:
    """A number as a person writes it: at most four significant digits, no trailing zeros, no minus zero."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.4g}"
