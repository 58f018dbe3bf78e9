"""Intervals: Wilson's as in the tables, and a bootstrap that knows what belongs together."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from qllava.evaluation.intervals import Share, bootstrap, wilson


def mean_of(values: np.ndarray) -> object:
    return lambda drawn: float(values[drawn].mean())


def test_wilson() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)  # Wilson's interval for 8 of 10, as in the tables
    assert wilson(0, 10)[0] == 0.0 and wilson(10, 10)[1] == 1.0
    assert {type(end) for end in wilson(3, 7)} == {float}  # what JSON can hold


@pytest.mark.parametrize("n", [1, 2, 7, 64, 1000])
def test_wilsons_interval_is_where_the_score_test_would_just_reject(n: int) -> None:
    """By its definition: the shares p whose distance from the observed one is at most 1.96 standard errors of p."""
    for correct in {0, 1, n // 3, n}:
        for end in wilson(correct, n):
            distance = abs(correct / n - end)
            assert distance == pytest.approx(norm.ppf(0.975) * (end * (1 - end) / n) ** 0.5, abs=1e-9)


def test_a_share_of_nothing_is_none() -> None:
    assert Share(0, 0).value is None and str(Share(0, 0)) == "none"
    assert str(Share(3, 4)).startswith(" 75.0 %  (3 of 4, 95 % interval 30.1 to 95.4 %)")


def test_the_bootstrap_of_a_mean_is_the_one_of_the_books() -> None:
    values = np.random.default_rng(1).normal(size=400)
    found = bootstrap(mean_of(values), range(400), reason="never")  # type: ignore[arg-type]
    error = values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.ci95 == pytest.approx(norm.interval(0.95, values.mean(), error), abs=0.1 * error)


def test_items_of_one_question_do_not_count_as_many() -> None:
    """Each value ten times over: alone that seems to be ten times the evidence, by question it is what it was."""
    values = np.random.default_rng(2).normal(size=50)
    once = bootstrap(mean_of(values), range(50), reason="never")  # type: ignore[arg-type]
    ten = np.repeat(values, 10)
    clustered = bootstrap(mean_of(ten), [n // 10 for n in range(500)], reason="never")  # type: ignore[arg-type]
    alone = bootstrap(mean_of(ten), range(500), reason="never")  # type: ignore[arg-type]
    assert clustered.ci95 == pytest.approx(once.ci95)
    assert clustered.ci95 is not None and alone.ci95 is not None
    assert np.ptp(clustered.ci95) > 2.5 * np.ptp(alone.ci95)


def test_undefined_is_said_to_be_undefined() -> None:
    assert bootstrap(lambda drawn: 1.0, [], reason="x").to_json() == {
        "value": None,
        "ci95": None,
        "undefined": "there are no items to count",
    }
    assert bootstrap(lambda drawn: None, [1, 2], reason="they are all alike").undefined == "they are all alike"
    one = bootstrap(lambda drawn: 0.5, ["q", "q"], reason="x")
    assert one.value == 0.5 and one.ci95 is None and one.undefined is not None and "one question" in one.undefined
    rare = bootstrap(lambda drawn: 1.0 if 0 in drawn else None, range(5), reason="x")
    assert rare.value == 1.0 and rare.ci95 is None and rare.undefined is not None and "too few" in rare.undefined
