"""How sure a figure is: Wilson's interval for a share, and the bootstrap over questions for everything else.

Wilson's interval is scipy's. The bootstrap is ours, because `scipy.stats.bootstrap` draws single observations: it can
neither draw whole clusters (all votes on one question) nor leave out draws on which a statistic is undefined.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2_000
_SEED = 0  # the same figures for the same answers, whoever asks


@dataclass(frozen=True)
class Share:
    """How many of `n` are `count`ed."""

    count: int
    n: int

    @property
    def value(self) -> float | None:
        """Between 0 and 1; None without trials."""
        return self.count / self.n if self.n else None

    @property
    def ci95(self) -> tuple[float, float]:
        """Wilson's interval."""
        return wilson(self.count, self.n)

    def __str__(self) -> str:
        if not self.n:
            return "none"
        low, high = self.ci95
        share = 100 * self.count / self.n
        return f"{share:5.1f} %  ({self.count} of {self.n}, 95 % interval {100 * low:.1f} to {100 * high:.1f} %)"


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval, or why there is none."""

    value: float | None
    ci95: tuple[float, float] | None
    undefined: str | None = None  # the reason, where the value or its interval is None

    def to_json(self) -> dict[str, Any]:
        """`value` and `ci95`, null where undefined, and then the reason under `undefined`."""
        found: dict[str, Any] = {"value": self.value, "ci95": None if self.ci95 is None else list(self.ci95)}
        return found if self.undefined is None else {**found, "undefined": self.undefined}

    def __str__(self) -> str:
        if self.value is None:
            return f"undefined: {self.undefined}"
        if self.ci95 is None:
            return f"{self.value:.3f}  (no interval: {self.undefined})"
        return f"{self.value:.3f}  (95 % interval {self.ci95[0]:.3f} to {self.ci95[1]:.3f})"


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval for a proportion; (0, 1) when nothing was asked."""
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
    """A statistic of n items, with the percentile interval of a bootstrap that draws whole clusters.

    Items of one cluster (votes on one question, say) go together, because they are not independent of each other; with
    a cluster of its own for each item this is the ordinary bootstrap. Draws on which the statistic is undefined are
    left out; where those are more than one in twenty, or with one cluster only, the interval is None.

    Args:
        statistic: from the numbers of the drawn items (with repetition) to its value; None where it is undefined.
        clusters: of each item.
        reason: why the statistic is undefined where it is, in words for the user.
    """
    members: dict[Hashable, list[int]] = {}
    for item, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(item)
    value = statistic(np.arange(len(clusters), dtype=np.intp)) if clusters else None
    if value is None:
        return Estimate(None, None, reason if clusters else "there is nothing to count")
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
