"""Agreement of a judge with people: their votes and the judge's verdicts on the same pairs of answers.

    qllava eval agreement --votes votes.jsonl --judgments judgments.jsonl --html agreement.html

Verdicts are `left`, `tie`, `right` and `both_bad`. Raw agreement and plain kappa (Cohen 1960) take them as four names.
Quadratic kappa (Cohen 1968), Spearman's rho and Kendall's tau-b need an order, which is left < tie < right; `both_bad`
prefers neither answer and has the same place as `tie`.

The judge saw each pair in both orders. If both verdicts agree, that is its verdict; if they differ, the order was
decisive, so the verdict is `tie`, and the vote counts as inconsistent. A vote with an order that is missing or could
not be read has no verdict; it is left out and counted.

Intervals are from a bootstrap that draws questions (with their images), not votes. The ceiling is the agreement of
people with each other, for two votes on the same answers to the same question; because the order of the two people is
arbitrary, each such pair of votes counts in both orders. An undefined figure (kappa of two raters that always give the
same verdict, a correlation with a constant) is reported as undefined with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from qllava.config import InputError
from qllava.evaluation.intervals import RESAMPLES, Estimate, bootstrap
from qllava.evaluation.judgments import Judgment, read_judgments
from qllava.voting.votes import VERDICTS, Verdict, Vote, read_votes

Codes = NDArray[np.int64]  # (N,) indices in VERDICTS
_MIRRORED: dict[Verdict, Verdict] = {"left": "right", "right": "left", "tie": "tie", "both_bad": "both_bad"}
_IN_ORDER = np.array([0, 1, 2, 1])  # rank of each verdict in VERDICTS, left < tie < right
_ALIKE = "both always give the same verdict, so agreement by chance is complete"
_CONSTANT = "one of the two always gives the same verdict"


@dataclass(frozen=True)
class Agreement:
    """Agreement of two columns of verdicts."""

    n: int
    """Number of pairs of verdicts."""
    agreement: Estimate
    """Share of equal verdicts."""
    kappa: Estimate
    """Cohen's kappa."""
    kappa_quadratic: Estimate
    """Cohen's kappa with quadratic weights, over the order of the verdicts."""
    spearman: Estimate
    """Spearman's rho."""
    kendall: Estimate
    """Kendall's tau-b."""

    def to_json(self) -> dict[str, Any]:
        """Return the figures, each an object with `value` and `ci95`."""
        return {"n": self.n, **{name: found.to_json() for name, found in self.measures().items()}}

    def measures(self) -> dict[str, Estimate]:
        """Return the figures by the names that `--json` uses."""
        return {
            "agreement": self.agreement,
            "kappa": self.kappa,
            "kappa_quadratic": self.kappa_quadratic,
            "spearman": self.spearman,
            "kendall": self.kendall,
        }


@dataclass(frozen=True)
class Report:
    """Comparison of a judge with people."""

    judge: str
    """Name of the judge."""
    with_people: Agreement
    """Agreement of the judge with people."""
    people: Agreement
    """Agreement of people with each other, the ceiling."""
    table: tuple[tuple[int, ...], ...]
    """(4, 4) counts by people's verdict (rows) and the judge's verdict (columns), in the order of VERDICTS."""
    questions: int
    """Number of distinct questions among the votes that were judged."""
    inconsistent: int
    """Number of votes for which the verdicts of the two orders differ."""
    unread: int
    """Number of votes left out because a reply could not be read."""
    unjudged: int
    """Number of votes left out because an order is missing."""
    first: Estimate
    """Share of the judge's decisions for a side that prefer the answer it saw first; 0.5 without bias."""
    consistent: Estimate
    """Share of votes for which the verdicts of both orders agree."""
    judge_longer: Estimate
    """Share of the judge's decisions for the longer answer, over votes where judge and person prefer a side."""
    people_longer: Estimate
    """Share of people's decisions for the longer answer, over the same votes."""
    longer_difference: Estimate
    """The judge's share minus the people's share; 0 without bias."""

    def to_json(self) -> dict[str, Any]:
        """Return the figures under the names that `qllava eval agreement --json` uses."""
        return {
            **self.with_people.to_json(),
            "judge": self.judge,
            "questions": self.questions,
            "inconsistent": self.inconsistent,
            "unread": self.unread,
            "unjudged": self.unjudged,
            "table": {
                mine: dict(zip(VERDICTS, row, strict=True)) for mine, row in zip(VERDICTS, self.table, strict=True)
            },
            "position": {"first": self.first.to_json(), "consistent": self.consistent.to_json()},
            "length": {
                "judge": self.judge_longer.to_json(),
                "people": self.people_longer.to_json(),
                "difference": self.longer_difference.to_json(),
            },
            "people": self.people.to_json(),
        }


@dataclass(frozen=True)
class _Judged:
    """A vote with the judge's verdicts in both orders."""

    vote: Vote
    """Vote of a person."""
    left_first: Verdict
    """Verdict of the judge with the left answer first."""
    right_first: Verdict
    """Verdict of the judge with the right answer first."""

    @property
    def verdict(self) -> Verdict:
        return self.left_first if self.left_first == self.right_first else "tie"

    @property
    def seen_first(self) -> tuple[int, int]:
        """Number of decisions for the answer that was seen first, and number of all decisions for a side."""
        decided = [v for v in (self.left_first, self.right_first) if v in ("left", "right")]
        return (self.left_first == "left") + (self.right_first == "right"), len(decided)

    @property
    def longer(self) -> Verdict | None:
        """Side of the answer with more characters; None if both are equally long or either rater prefers no side."""
        left, right = len(self.vote.answers["left"]), len(self.vote.answers["right"])
        if left == right or not {self.verdict, self.vote.vote} <= {"left", "right"}:
            return None
        return "left" if left > right else "right"


def compare_files(votes: Path, judgments: Path) -> Report:
    """Compare the votes and judgments of two files, for `qllava eval agreement`.

    Raises:
        InputError: A file cannot be read, or no judgment belongs to a vote.
    """
    given, judged = read_votes(votes), read_judgments(judgments)
    if not {found.id for found in judged} & {vote.id for vote in given}:
        raise InputError(
            f"No judgment in {judgments} has the id of a vote in {votes}. Give the file of judgments that "
            "`qllava eval judge` made from these votes."
        )
    return compare(given, judged)


def compare(votes: Sequence[Vote], judgments: Sequence[Judgment], *, resamples: int = RESAMPLES) -> Report:
    """Compare people's votes with the judgments of one judge, joined by the vote's id."""
    by_order = {(found.id, found.order): found.vote for found in judgments}
    both = [(vote, [by_order[key] for key in _keys(vote) if key in by_order]) for vote in votes]
    judged = [
        _Judged(vote, verdicts[0], verdicts[1])
        for vote, verdicts in both
        if len(verdicts) == 2 and verdicts[0] is not None and verdicts[1] is not None
    ]
    people = _codes([item.vote.vote for item in judged])
    judge = _codes([item.verdict for item in judged])
    table = np.zeros((len(VERDICTS), len(VERDICTS)), dtype=np.int64)
    np.add.at(table, (people, judge), 1)
    asked = [item.vote.asked for item in judged]

    def share(counts: Sequence[tuple[float, float]], reason: str) -> Estimate:
        return _share(counts, asked, reason, resamples)

    longer = [(item, item.longer) for item in judged]
    by_judge = [(float(item.verdict == side), float(side is not None)) for item, side in longer]
    by_people = [(float(item.vote.vote == side), float(side is not None)) for item, side in longer]
    difference = [(mine[0] - theirs[0], mine[1]) for mine, theirs in zip(by_judge, by_people, strict=True)]
    no_length = "on no vote with answers of different length do both prefer a side"
    return Report(
        judge=judgments[0].judge if judgments else "",
        with_people=measure(people, judge, asked, resamples=resamples),
        people=_ceiling(votes, resamples),
        table=tuple(tuple(int(count) for count in row) for row in table),
        questions=len(set(asked)),
        inconsistent=sum(item.left_first != item.right_first for item in judged),
        unread=sum(None in verdicts for _, verdicts in both),
        unjudged=sum(len(verdicts) < 2 and None not in verdicts for _, verdicts in both),
        first=share([item.seen_first for item in judged], "the judge never preferred a side"),
        consistent=share([(float(item.left_first == item.right_first), 1.0) for item in judged], ""),
        judge_longer=share(by_judge, no_length),
        people_longer=share(by_people, no_length),
        longer_difference=share(difference, no_length),
    )


def measure(a: Codes, b: Codes, asked: Sequence[Hashable], *, resamples: int = RESAMPLES) -> Agreement:
    """Return all measures of two columns of verdicts.

    Args:
        a: (N,) verdicts of the first rater, as indices in VERDICTS.
        b: (N,) verdicts of the second rater.
        asked: Question of each pair of verdicts, N in all; the bootstrap draws questions.
        resamples: Number of draws of the bootstrap.
    """

    def estimate(statistic: Callable[[Codes, Codes], float | None], reason: str) -> Estimate:
        return bootstrap(lambda drawn: statistic(a[drawn], b[drawn]), asked, reason=reason, resamples=resamples)

    return Agreement(
        n=len(a),
        agreement=estimate(lambda x, y: float(np.mean(x == y)), ""),
        kappa=estimate(kappa, _ALIKE),
        kappa_quadratic=estimate(lambda x, y: kappa(_IN_ORDER[x], _IN_ORDER[y], quadratic=True), _ALIKE),
        spearman=estimate(spearman, _CONSTANT),
        kendall=estimate(kendall, _CONSTANT),
    )


def kappa(a: Codes, b: Codes, *, quadratic: bool = False) -> float | None:
    """Return Cohen's kappa of two columns of codes 0, 1, ...; None if agreement by chance is complete.

    With `quadratic`, the weight of a disagreement is the squared difference of the codes; otherwise all are equal.
    """
    size = len(VERDICTS)
    counts = np.bincount(a * size + b, minlength=size * size).reshape(size, size)
    apart = np.subtract.outer(np.arange(size), np.arange(size))
    weight = apart**2 if quadratic else (apart != 0)
    by_chance = (weight * np.outer(counts.sum(1), counts.sum(0))).sum() / len(a)
    return float(1 - (weight * counts).sum() / by_chance) if by_chance > 0 else None


def spearman(a: Codes, b: Codes) -> float | None:
    """Return Spearman's rho of the verdicts in their order; None if one column is constant."""
    x, y = _IN_ORDER[a], _IN_ORDER[b]
    return None if _constant(x) or _constant(y) else float(stats.spearmanr(x, y).statistic)


def kendall(a: Codes, b: Codes) -> float | None:
    """Return Kendall's tau-b of the verdicts in their order; None if one column is constant."""
    x, y = _IN_ORDER[a], _IN_ORDER[b]
    return None if _constant(x) or _constant(y) else float(stats.kendalltau(x, y, method="asymptotic").statistic)


def _constant(values: Codes) -> bool:
    return bool((values == values[0]).all())


def _keys(vote: Vote) -> tuple[tuple[str, str], tuple[str, str]]:
    return (vote.id, "left-first"), (vote.id, "right-first")


def _codes(verdicts: Sequence[Verdict]) -> Codes:
    return np.array([VERDICTS.index(verdict) for verdict in verdicts], dtype=np.int64)


def _share(counts: Sequence[tuple[float, float]], asked: Sequence[Hashable], reason: str, resamples: int) -> Estimate:
    """Return the ratio of two sums over votes, with its interval."""
    both = np.array(counts, dtype=np.float64).reshape(-1, 2)

    def ratio(drawn: NDArray[np.intp]) -> float | None:
        of, n = both[drawn].sum(0)
        return float(of / n) if n else None

    return bootstrap(ratio, asked, reason=reason, resamples=resamples)


def _ceiling(votes: Sequence[Vote], resamples: int) -> Agreement:
    """Return the agreement of people with each other, over every two raters of the same answers to a question.

    The sides of the answers may be swapped. If a rater voted on a pair several times, the last vote counts; a vote
    without a rater is ignored.
    """
    pairs: dict[tuple[Hashable, str, str], dict[str, Verdict]] = {}
    for vote in votes:
        if vote.rater is not None:
            left, right = vote.answers["left"], vote.answers["right"]
            swapped = left > right
            answers = (right, left) if swapped else (left, right)
            pairs.setdefault((vote.asked, *answers), {})[vote.rater] = _MIRRORED[vote.vote] if swapped else vote.vote
    one: list[Verdict] = []
    other: list[Verdict] = []
    asked: list[Hashable] = []
    for (question, _, _), by_rater in pairs.items():
        verdicts = list(by_rater.values())
        for i, mine in enumerate(verdicts):
            for theirs in verdicts[i + 1 :]:
                one += [mine, theirs]
                other += [theirs, mine]
                asked += [question] * 2
    found = measure(_codes(one), _codes(other), asked, resamples=resamples)
    return Agreement(n=found.n // 2, **found.measures())
