"""Definitions shared by all parts of a page: the type of markup, and the format of numbers."""

from __future__ import annotations

import math

from markupsafe import Markup

Html = Markup
"""Markup made by a function of this package; a plain `str` is text, and is escaped in markup."""


def number(value: float) -> str:
    """Format a number with at most four significant digits, no trailing zeros and no minus zero."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.4g}"
