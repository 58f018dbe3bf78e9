"""Figures of an evaluation as a page and as lines for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qllava import page
from qllava.config import InputError
from qllava.evaluation.intervals import Estimate
from qllava.page import Html
from qllava.voting.votes import VERDICTS

if TYPE_CHECKING:
    from qllava.evaluation.agreement import Agreement, Report  # scipy's statistics take a second to import

_NAMES = {
    "agreement": "raw agreement",
    "kappa": "kappa",
    "kappa_quadratic": "quadratic kappa",
    "spearman": "Spearman's rho",
    "kendall": "Kendall's tau-b",
}


def write(path: Path, html: str) -> None:
    """Write a page completely or not at all.

    Raises:
        InputError: The file cannot be written.
    """
    try:
        page.write_page(path, html)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another path.") from error


def agreement_text(report: Report) -> str:
    """Return the figures of `qllava eval agreement` for the terminal."""
    counted = f"{report.with_people.n} votes on {report.questions} questions, judged by {report.judge or 'the judge'}"
    return "\n".join(
        [
            counted,
            *_lines(_named(report.with_people)),
            "Agreement of people with each other" + (f", {report.people.n} pairs of votes" if report.people.n else ""),
            *(_lines(_named(report.people)) if report.people.n else ["  no two people voted on the same answers"]),
            "Bias of the judge",
            *_lines(_biases(report)),
            *_left_out(report),
        ]
    )


def agreement_page(report: Report) -> str:
    """Return the figures of `qllava eval agreement` as a page: measures with intervals, verdicts, and biases."""
    cells: list[list[str | float]] = [[_said(mine), *row] for mine, row in zip(VERDICTS, report.table, strict=True)]
    counts = page.table(["people", *map(_said, VERDICTS)], cells, caption="Verdicts of people (rows) and of the judge")
    ceiling = (
        _measures("People with each other", report.people)
        if report.people.n
        else page.paragraph(
            "No two people voted on the same answers, so the agreement of people is unknown.", muted=True
        )
    )
    lead = (
        f"{report.judge or 'The judge'} compared with {report.with_people.n} votes of people on {report.questions} "
        "questions. Bars are 95 % intervals of a bootstrap over questions."
    )
    return page.page(
        "Agreement of the judge with people",
        lead,
        [
            page.section("Agreement", page.grid(_measures("The judge with people", report.with_people), ceiling)),
            page.section("Verdicts", counts, *(page.paragraph(line, muted=True) for line in _left_out(report))),
            page.section("Bias of the judge", _table(_biases(report))),
        ],
        footer='Verdicts have the order left < tie < right; "both bad" counts as a tie if an order is needed.',
    )


def _measures(title: str, found: Agreement) -> Html:
    named = _named(found)
    drawn = [
        (name, one.value, *(one.ci95 or (one.value, one.value))) for name, one in named.items() if one.value is not None
    ]
    missing = {name: one for name, one in named.items() if one.undefined is not None}
    chart = page.interval_chart(title, drawn, -1.0, 1.0) if drawn else page.paragraph(f"{title}: nothing to draw.")
    return page.group(chart, *(page.paragraph(f"{name}: {one}", muted=True) for name, one in missing.items()))


def _named(found: Agreement) -> dict[str, Estimate]:
    return {_NAMES[name]: one for name, one in found.measures().items()}


def _biases(report: Report) -> dict[str, Estimate]:
    return {
        "prefers the first answer": report.first,
        "same in both orders": report.consistent,
        "prefers the longer answer": report.judge_longer,
        "people prefer the longer": report.people_longer,
        "difference": report.longer_difference,
    }


def _left_out(report: Report) -> list[str]:
    notes = {
        "Votes counted as ties because the two orders disagree": report.inconsistent,
        "Votes left out because a reply could not be read": report.unread,
        "Votes left out because the judge did not see them in both orders": report.unjudged,
    }
    return [f"{said}: {count}." for said, count in notes.items() if count]


def _lines(estimates: Mapping[str, Estimate]) -> list[str]:
    return [f"  {name:<27}{one}" for name, one in estimates.items()]


def _table(estimates: Mapping[str, Estimate]) -> Html:
    return page.table(["share", "value"], [[name, str(one)] for name, one in estimates.items()])


def _said(verdict: str) -> str:
    return verdict.replace("_", " ")
