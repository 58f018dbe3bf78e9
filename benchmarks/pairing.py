"""Statistics of measurements that were taken in turn: ratios within a repetition, their median and its interval.

The speed of a shared machine changes by a third within minutes. Measurements of the same repetition met the same
conditions, so only ratios within a repetition are used, never the ratio of two means over repetitions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000


def paired_ratio(seconds: Sequence[float], baseline: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Return the speed relative to the baseline: the median of baseline / seconds, and its 95 % bootstrap interval.

    Args:
        seconds: Seconds in each repetition.
        baseline: Seconds of the baseline in the same repetitions, in the same order.

    Raises:
        ValueError: If the two have different lengths, or are empty.
    """
    if len(seconds) != len(baseline) or not len(seconds):
        raise ValueError(f"{len(seconds)} and {len(baseline)} measurements cannot be paired")
    ratios = np.asarray(baseline, dtype=float) / np.asarray(seconds, dtype=float)
    drawn = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(np.median(ratios)), (float(low), float(high))


def largest_difference(values: Sequence[float]) -> float:
    """Return the largest difference from the first value, relative to it; NaN if any value is NaN.

    numpy's max is used because Python's would ignore a NaN.
    """
    return float(np.max(np.abs(np.asarray(values) - values[0])) / abs(values[0]))
