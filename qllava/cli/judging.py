"""The verbs `qllava eval ...` that weigh answers against each other: agreement."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qllava.cli.flags import Verbs, add_verb, json_flag, quietly


def add(kinds: Verbs) -> None:
    """Add these evaluations to `eval`."""
    agreement = add_verb(kinds, "agreement", run_eval_agreement, "does a judge decide as people do, with intervals")
    agreement.add_argument("--votes", metavar="V.jsonl", type=Path, required=True, help="people's, as the demo wrote")
    agreement.add_argument(
        "--judgments", metavar="J.jsonl", type=Path, required=True, help="the judge's, by `qllava eval judge --votes`"
    )
    agreement.add_argument("--html", metavar="FILE", type=Path, help="write a page with a plot")
    json_flag(agreement)


def run_eval_agreement(arguments: argparse.Namespace) -> int:
    """`qllava eval agreement`: people against the judge, people against people, and the judge's biases."""
    from qllava.evaluation import pages
    from qllava.evaluation.agreement import compare_files

    report = quietly(lambda: compare_files(arguments.votes, arguments.judgments), arguments.json)
    if arguments.html is not None:
        pages.write(arguments.html, pages.agreement_page(report))
    print(json.dumps(report.to_json()) if arguments.json else pages.agreement_text(report))
    return 0
