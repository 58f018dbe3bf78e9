"""Does a judge decide as people do? Votes of people against a judge's on the same pairs of answers.

    qllava eval agreement --votes votes.jsonl --judgments judgments.jsonl --html agreement.html

Verdicts are `left`, `tie`, `right` and `both_bad`. Raw agreement and plain kappa (Cohen 1960) take them as four names.
Quadratic kappa (Cohen 1968), Spearman's rho and Kendall's tau-b need an order, which is left < tie < right; `both_bad`
prefers neither answer and lies where `tie` does.

The judge saw each pair in both orders. What it says twice is its verdict; where the two differ the order has decided,
so the verdict is `tie`, and the vote is counted as inconsistent. A vote of which one order is missing or could not be
read has no verdict and is left out, counted.

Intervals are of a bootstrap that draws questions (with their images), not votes. The ceiling is how people agree
with each other where two of them voted on the same answers to the same question; who comes first of the two means
nothing, so each such pair of votes is taken both ways. A figure that is undefined (kappa of two that always say the
same, a correlation with a constant) is given as undefined with the reason.
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

Codes = NDArray[np.int64]  # (N,) places in VERDICTS
_MIRRORED: dict[Verdict, Verdict] = {"left": "right", "right": "left", "tie": "tie", "both_bad": "both_bad"}
_IN_ORDER = np.array([0, 1, 2, 1])  # of VERDICTS, left < tie < right
_ALIKE = "both always give the same verdict, so agreement by chance is complete"
_CONSTANT = "one of the two always gives the same verdict"


@dataclass(frozen=True)
class Agreement:
    """How alike two columns of verdicts are."""

    n: int  # pairs of verdicts
    agreement: Estimate  # the share of equal verdicts
    kappa: Estimate
    kappa_quadratic: Estimate
    spearman: Estimate
    kendall: Estimate

    def to_json(self) -> dict[str, Any]:
        """The figures, each an object with `value` and `ci95`."""
        return {"n": self.n, **{name: found.to_json() for name, found in self.measures().items()}}

    def measures(self) -> dict[str, Estimate]:
        """The figures by the names that `--json` promises."""
        return {
            "agreement": self.agreement,
            "kappa": self.kappa,
            "kappa_quadratic": self.kappa_quadratic,
            "spearman": self.spearman,
            "kendall": self.kendall,
        }


@dataclass(frozen=True)
class Report:
    """A judge beside people."""

    judge: str
    with_people: Agreement
    people: Agreement  # with each other: the ceiling
    table: tuple[tuple[int, ...], ...]  # (4, 4) counts, people's verdict by the judge's, in the order of VERDICTS
    questions: int  # different ones among the votes that were judged
    inconsistent: int  # votes on which the two orders differ
    unread: int  # votes left out: a reply could not be read
    unjudged: int  # votes left out: an order is missing
    first: Estimate  # of the judge's decisions for a side, the share for the answer it saw first: 0.5 without bias
    consistent: Estimate  # the share of votes on which both orders say the same
    judge_longer: Estimate  # where both decide for a side: how often for the longer answer
    people_longer: Estimate
    longer_difference: Estimate  # the judge's share less the people's: 0 without bias

    def to_json(self) -> dict[str, Any]:
        """The figures, under the names that `qllava eval agreement --json` promises."""
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
    """A vote and the verdicts of the judge, which saw it in both orders."""

    vote: Vote
    left_first: Verdict
    right_first: Verdict

    @property
    def verdict(self) -> Verdict:
        return self.left_first if self.left_first == self.right_first else "tie"

    @property
    def seen_first(self) -> tuple[int, int]:
        """Decisions for the answer that was seen first, and decisions in all."""
        decided = [v for v in (self.left_first, self.right_first) if v in ("left", "right")]
        return (self.left_first == "left") + (self.right_first == "right"), len(decided)

    @property
    def longer(self) -> Verdict | None:
        """The side of the longer answer, in characters; None where the judge or the person decided for no side."""
        left, right = len(self.vote.answers["left"]), len(self.vote.answers["right"])
        if left == right or not {self.verdict, self.vote.vote} <= {"left", "right"}:
            return None
        return "left" if left > right else "right"


def compare_files(votes: Path, judgments: Path) -> Report:
    """`qllava eval agreement`. Raises InputError for unreadable files, or when no judgment belongs to a vote."""
    given, judged = read_votes(votes), read_judgments(judgments)
    if not {found.id for found in judged} & {vote.id for vote in given}:
        raise InputError(
            f"No judgment in {judgments} has the id of a vote in {votes}; give the judgments that were made of these "
            "votes."
        )
    return compare(given, judged)


def compare(votes: Sequence[Vote], judgments: Sequence[Judgment], *, resamples: int = RESAMPLES) -> Report:
    """People's votes against the judgments of one judge, joined by the vote's id."""
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
    no_length = "there is not a single vote with answers of different length on which both preferred a side"
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
    """All measures of two columns of verdicts (as places in VERDICTS), and of which question each example is."""

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
    """Cohen's kappa of two columns of codes 0, 1, ...; None where chance alone agrees always.

    With `quadratic` a disagreement weighs the square of the difference of the codes, else each weighs the same.
    """
    size = len(VERDICTS)
    counts = np.bincount(a * size + b, minlength=size * size).reshape(size, size)
    apart = np.subtract.outer(np.arange(size), np.arange(size))
    weight = apart**2 if quadratic else (apart != 0)
    by_chance = (weight * np.outer(counts.sum(1), counts.sum(0))).sum() / len(a)
    return float(1 - (weight * counts).sum() / by_chance) if by_chance > 0 else None


def spearman(a: Codes, b: Codes) -> float | None:
    """Spearman's rho of verdicts in their order; None where one column is constant."""
    x, y = _IN_ORDER[a], _IN_ORDER[b]
    return None if _constant(x) or _constant(y) else float(stats.spearmanr(x, y).statistic)


def kendall(a: Codes, b: Codes) -> float | None:
    """Kendall's tau-b of verdicts in their order; None where one column is constant."""
    x, y = _IN_ORDER[a], _IN_ORDER[b]
    return None if _constant(x) or _constant(y) else float(stats.kendalltau(x, y, method="asymptotic").statistic)


def _constant(values: Codes) -> bool:
    return bool((values == values[0]).all())


def _keys(vote: Vote) -> tuple[tuple[str, str], tuple[str, str]]:
    return (vote.id, "left-first"), (vote.id, "right-first")


def _codes(verdicts: Sequence[Verdict]) -> Codes:
    return np.array([VERDICTS.index(verdict) for verdict in verdicts], dtype=np.int64)


def _share(counts: Sequence[tuple[float, float]], asked: Sequence[Hashable], reason: str, resamples: int) -> Estimate:
    """A ratio of two sums over votes, with its interval."""
    both = np.array(counts, dtype=np.float64).reshape(-1, 2)

    def ratio(drawn: NDArray[np.intp]) -> float | None:
        of, n = both[drawn].sum(0)
        return float(of / n) if n else None

    return bootstrap(ratio, asked, reason=reason, resamples=resamples)


def _ceiling(votes: Sequence[Vote], resamples: int) -> Agreement:
    """People against people: every two raters of the same answers to the same question, on whichever side they stood.

    Of several votes of one rater on a pair the last counts; a vote of nobody in particular counts with no other.
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
