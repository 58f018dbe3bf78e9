"""Confidence intervals: Wilson's for a share, and a bootstrap over questions for all other figures.

Wilson's interval is computed by scipy. The bootstrap is our own, because `scipy.stats.bootstrap` draws single
observations: it can neither draw whole clusters (all votes on one question) nor leave out draws for which a statistic
is undefined.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2_000
_SEED = 0  # fixed, so that the same answers always give the same figures


@dataclass(frozen=True)
class Share:
    """Share of items that count."""

    count: int
    """Number of items that count."""
    n: int
    """Number of all items."""

    @property
    def value(self) -> float | None:
        """Share between 0 and 1; None without items."""
        return self.count / self.n if self.n else None

    @property
    def ci95(self) -> tuple[float, float]:
        """Wilson's 95 % interval."""
        return wilson(self.count, self.n)

    def __str__(self) -> str:
        if not self.n:
            return "none"
        low, high = self.ci95
        share = 100 * self.count / self.n
        return f"{share:5.1f} %  ({self.count} of {self.n}, 95 % interval {100 * low:.1f} to {100 * high:.1f} %)"


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval, or the reason why there is none."""

    value: float | None
    """Figure; None if it is undefined."""
    ci95: tuple[float, float] | None
    """95 % interval; None if it is undefined."""
    undefined: str | None = None
    """Reason why the value or its interval is None."""

    def to_json(self) -> dict[str, Any]:
        """Return `value` and `ci95`; if one is null, the reason is under `undefined`."""
        found: dict[str, Any] = {"value": self.value, "ci95": None if self.ci95 is None else list(self.ci95)}
        return found if self.undefined is None else {**found, "undefined": self.undefined}

    def __str__(self) -> str:
        if self.value is None:
            return f"undefined: {self.undefined}"
        if self.ci95 is None:
            return f"{self.value:.3f}  (no interval: {self.undefined})"
        return f"{self.value:.3f}  (95 % interval {self.ci95[0]:.3f} to {self.ci95[1]:.3f})"


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval for a proportion; (0, 1) if n is 0."""
    if n == 0:
        return 0.0, 1.0
    from scipy.stats import binomtest  # here: it takes a second to import

    found = binomtest(correct, n).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def bootstrap(
    statistic: Callable[[NDArray[np.intp]], float | None],
    clusters: Sequence[Hashable],
    *,
    reason: str,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Return a statistic of n items with the percentile interval of a bootstrap that draws whole clusters.

    Items of one cluster (for example votes on one question) are drawn together, because they are not independent; if
    each item has its own cluster, this is the ordinary bootstrap. Draws for which the statistic is undefined are left
    out. If these are more than one in twenty, or if there is only one cluster, the interval is None.

    Args:
        statistic: Function from the indices of the drawn items (with repetition) to the value; None if undefined.
        clusters: Cluster of each item.
        reason: Reason for the user why the statistic can be undefined.
        resamples: Number of draws.
    """
    members: dict[Hashable, list[int]] = {}
    for item, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(item)
    value = statistic(np.arange(len(clusters), dtype=np.intp)) if clusters else None
    if value is None:
        return Estimate(None, None, reason if clusters else "there are no items to count")
    if len(members) < 2:
        return Estimate(value, None, "all belong to one question, so nothing can be resampled")
    groups = [np.array(items, dtype=np.intp) for items in members.values()]
    random = np.random.default_rng(_SEED)
    drawn = (random.integers(len(groups), size=len(groups)) for _ in range(resamples))
    values = [statistic(np.concatenate([groups[i] for i in indices])) for indices in drawn]
    defined = [value for value in values if value is not None]
    if len(defined) < 0.95 * resamples:
        return Estimate(value, None, "there are too few questions: it is undefined on many draws of the bootstrap")
    low, high = np.percentile(defined, [2.5, 97.5])
    return Estimate(value, (float(low), float(high)))
