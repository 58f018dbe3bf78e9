"""Results of a grid, as a table in Markdown and as a page with charts.

A figure is the mean over seeds. With two seeds or more, its interval is Student's over the seeds: what another seed
would give on the same questions. With one seed it is Wilson's over the questions, and says nothing about other seeds.
The difference from the variant that it is compared with is computed seed by seed, so that the effect of a seed on both
cancels out; with one seed it has no interval.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from scipy import stats

from qllava import page
from qllava.experiments.ablation import Grid, Measured
from qllava.files import write_whole
from qllava.page import Series
from qllava.runs import REPORT_FILE

HEAD = (
    "variant",
    "seeds",
    "accuracy",
    "95 % interval",
    "compared with",
    "difference in points",
    "95 % interval of the difference",
)
NOTE = (
    "Figures are means over seeds. The 95 % interval is Student's over the seeds or, with only one seed, Wilson's over "
    "the questions. Differences are computed seed by seed."
)


@dataclass(frozen=True)
class Row:
    """Figures of one variant, accuracies between 0 and 1."""

    variant: str
    """Name of the variant."""
    seeds: int
    """Number of seeds that were measured."""
    right: float
    """Mean accuracy over the seeds."""
    ci95: tuple[float, float]
    """95 % interval of the mean accuracy."""
    against: str
    """Name of the variant that it is compared with."""
    gain: float | None
    """Mean difference from `against` on the seeds that both have; None if there are none, or for itself."""
    gain_ci95: tuple[float, float] | None
    """95 % interval of `gain`; None with fewer than two seeds in common."""


def rows(grid: Grid, measured: Sequence[Measured]) -> list[Row]:
    """Return the figures of each measured variant, in the order of the grid."""
    results: dict[str, dict[int, Measured]] = {variant.name: {} for variant in grid.variants}
    for one in measured:
        results[one.variant][one.seed] = one
    out: list[Row] = []
    for variant in grid.variants:
        found, other = results[variant.name], results[variant.against]
        if not found:
            continue
        right = [one.result for one in found.values()]
        low, high = student(right) or next(iter(found.values())).ci95
        gains = [found[s].result - other[s].result for s in found if s in other] if found is not other else []
        gain = sum(gains) / len(gains) if gains else None
        interval = (max(0.0, low), min(1.0, high))
        mean = sum(right) / len(right)
        out.append(Row(variant.name, len(found), mean, interval, variant.against, gain, student(gains)))
    return out


def student(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of a mean by Student's t; None for fewer than two values.

    >>> [round(bound, 3) for bound in student([0.90, 0.92, 0.94])]
    [0.87, 0.97]
    """
    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    half = float(stats.t.ppf(0.975, n - 1)) * spread
    return mean - half, mean + half


def markdown(found: Sequence[Row]) -> str:
    """Return the table in Markdown."""
    lines = [HEAD, ("---",) * len(HEAD), *(_cells(row) for row in found)]
    text = "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |" for cells in lines)
    return f"{text}\n\n{NOTE}\n"


def _cells(row: Row) -> tuple[str, ...]:
    gain = "" if row.gain is None else f"{100 * row.gain:+.1f}"
    over = "" if row.gain_ci95 is None else f"{100 * row.gain_ci95[0]:+.1f} to {100 * row.gain_ci95[1]:+.1f}"
    low, high = row.ci95
    against = "" if row.gain is None else row.against
    interval = f"{100 * low:.1f} to {100 * high:.1f}"
    return row.variant, str(row.seeds), f"{100 * row.right:.1f} %", interval, against, gain, over


def write(out: Path, grid: Grid, measured: Sequence[Measured]) -> Path:
    """Write `OUT/cells.json` (each cell as it was measured), `table.md` and `report.html`; return its path."""
    found = rows(grid, measured)
    cells = [asdict(one) for one in measured]
    write_whole(out / "cells.json", json.dumps(cells, indent=1) + "\n")
    write_whole(out / "table.md", markdown(found))
    missing = len(grid.variants) * len(grid.seeds) - len(measured)
    parts = [page.callout(f"Unfinished cells (a variant with a seed): {missing}.", "warning")] if missing else []
    shares = [(row.variant, row.right, *row.ci95) for row in found]
    gains = [(row.variant, row.gain, *row.gain_ci95) for row in found if row.gain is not None and row.gain_ci95]
    lowest = math.floor(10 * min((row.ci95[0] for row in found), default=0.0)) / 10
    charts = [page.interval_chart("Accuracy", shares, lowest, 1.0)]
    if gains:
        reach = max(0.01, *(abs(bound) for _, _, *interval in gains for bound in interval))
        charts.append(page.interval_chart("Difference from the variant compared with", gains, -reach, reach))
    curves = _curves(measured)
    if curves:
        charts.append(page.line_chart("Accuracy over optimizer steps (mean over seeds)", curves, share=True))
    parts += [page.section("Figures", page.table(HEAD, [_cells(row) for row in found])), page.grid(*charts)]
    path = out / REPORT_FILE
    page.write_page(path, page.page("Ablations", NOTE, parts, footer="Written by qllava from this folder's files."))
    return path


def _curves(measured: Sequence[Measured]) -> list[Series]:
    """Return the mean over seeds at each step, for variants whose checkpoints were measured."""
    at: dict[str, dict[int, list[float]]] = {}
    for one in measured:
        for step, share in one.points if len(one.points) > 1 else ():
            at.setdefault(one.variant, {}).setdefault(step, []).append(share)
    return [
        Series(variant, [(step, sum(shares) / len(shares)) for step, shares in sorted(steps.items())])
        for variant, steps in at.items()
    ]
