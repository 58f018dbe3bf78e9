"""The verbs `qllava eval ...` that weigh answers against each other: ensemble, agreement."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qllava.cli.flags import Verbs, add_verb, json_flag, quietly
from qllava.config import InputError


def add(kinds: Verbs) -> None:
    """Add these evaluations to `eval`."""
    ensemble = add_verb(kinds, "ensemble", run_eval_ensemble, "two sets of ScienceQA answers as one, and what it gains")
    ensemble.add_argument("--problems", metavar="P.json", type=Path, required=True, help="ScienceQA's problems.json")
    ensemble.add_argument("--split", default="test", help="which of the problems (default: test)")
    ensemble.add_argument("--answers", metavar="A.jsonl", type=Path, required=True, help="of the first")
    ensemble.add_argument("--partner", metavar="B.jsonl", type=Path, required=True, help="of the second")
    ensemble.add_argument(
        "--rule",
        choices=("complement", "judge"),
        required=True,
        help="complement: the partner where the first cannot be read; judge: a model decides where they differ",
    )
    _judge_flags(ensemble)
    json_flag(ensemble)
    agreement = add_verb(kinds, "agreement", run_eval_agreement, "does a judge decide as people do, with intervals")
    agreement.add_argument("--votes", metavar="V.jsonl", type=Path, required=True, help="people's, as the demo wrote")
    agreement.add_argument(
        "--judgments", metavar="J.jsonl", type=Path, required=True, help="the judge's, by `qllava eval judge --votes`"
    )
    agreement.add_argument("--html", metavar="FILE", type=Path, help="write a page with a plot")
    json_flag(agreement)


def _judge_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--judge", metavar="NAME", help="a model's name, as its server calls it")
    parser.add_argument("--base-url", metavar="URL", help="an OpenAI-compatible server (default: OPENAI_BASE_URL)")
    parser.add_argument(
        "--store", metavar="FILE", type=Path, help="where replies are kept, so that none is asked twice (the cache)"
    )


def run_eval_ensemble(arguments: argparse.Namespace) -> int:
    """`qllava eval ensemble`: accuracy of both and of the two together, who helped where, and the gain."""
    from qllava.evaluation.asking import Judge
    from qllava.evaluation.ensemble import combine_files

    if (arguments.rule == "judge") != bool(arguments.judge):
        raise InputError("--rule judge and --judge NAME belong together; give both, or --rule complement alone.")
    judge = Judge(arguments.judge, arguments.base_url, arguments.store) if arguments.judge else None
    result = quietly(
        lambda: combine_files(
            arguments.problems,
            arguments.answers,
            arguments.partner,
            arguments.rule,
            judge=judge,
            split=arguments.split,
        ),
        arguments.json,
    )
    print(json.dumps(result.to_json()) if arguments.json else result.text())
    return 0


def run_eval_agreement(arguments: argparse.Namespace) -> int:
    """`qllava eval agreement`: people against the judge, people against people, and the judge's biases."""
    from qllava.evaluation import pages
    from qllava.evaluation.agreement import compare_files

    report = quietly(lambda: compare_files(arguments.votes, arguments.judgments), arguments.json)
    if arguments.html is not None:
        pages.write(arguments.html, pages.agreement_page(report))
    print(json.dumps(report.to_json()) if arguments.json else pages.agreement_text(report))
    return 0
