"""Statistics of measurements that were taken in turn: ratios within a repetition, their median and its interval.

A machine that is shared gets slower and faster by a third within minutes. What was measured in the same repetition met
the same machine, so only ratios within a repetition are looked at; never a mean over repetitions of each side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000


def paired_ratio(seconds: Sequence[float], baseline: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """How many times as fast as the baseline: the median of baseline / seconds, and its bootstrap interval of 95 %.

    seconds, baseline: of the same repetitions, in the same order.
    Raises ValueError when they are not of the same number, or there is none.
    """
    if len(seconds) != len(baseline) or not len(seconds):
        raise ValueError(f"{len(seconds)} and {len(baseline)} measurements cannot be paired")
    ratios = np.asarray(baseline, dtype=float) / np.asarray(seconds, dtype=float)
    drawn = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(np.median(ratios)), (float(low), float(high))


def largest_difference(values: Sequence[float]) -> float:
    """How far values lie from the first, relative to it; NaN when one is (Python's own max would pass over it)."""
    return float(np.max(np.abs(np.asarray(values) - values[0])) / abs(values[0]))
