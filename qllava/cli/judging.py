"""The commands `qllava eval ensemble`, `judge` and `agreement`: compare answers with each other."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from qllava.arguments import check_file, check_folder, check_kept, check_written, file_path, looks
from qllava.cli.flags import Verbs, add_verb, html_flag, json_flag, problems_flags, quietly, server_flags
from qllava.config import InputError

if TYPE_CHECKING:
    from qllava.evaluation.asking import Judge


def add(kinds: Verbs) -> None:
    """Add these evaluations to `qllava eval`."""
    ensemble = add_verb(
        kinds, "ensemble", run_eval_ensemble, "combine two sets of ScienceQA answers and measure the gain"
    )
    problems_flags(ensemble)
    ensemble.add_argument(
        "--answers", metavar="A.jsonl", type=file_path, required=True, help="answers of the first model"
    )
    ensemble.add_argument(
        "--partner", metavar="B.jsonl", type=file_path, required=True, help="answers of the second model"
    )
    ensemble.add_argument(
        "--rule",
        choices=("complement", "judge"),
        required=True,
        help="complement: use --partner where an answer of --answers is unreadable; judge: a judge decides differences",
    )
    _judge_flags(ensemble)
    json_flag(ensemble)
    looks(ensemble, problems=check_file, answers=check_file, partner=check_file, store=check_kept)
    _add_judge(kinds)
    agreement = add_verb(
        kinds, "agreement", run_eval_agreement, "measure how often a judge and people agree, with confidence intervals"
    )
    agreement.add_argument(
        "--votes", metavar="V.jsonl", type=file_path, required=True, help="people's votes, as written by the demo"
    )
    agreement.add_argument(
        "--judgments",
        metavar="J.jsonl",
        type=file_path,
        required=True,
        help="the judge's votes, as written by `qllava eval judge --votes`",
    )
    html_flag(agreement, "a plot")
    json_flag(agreement)
    looks(agreement, votes=check_file, judgments=check_file, html=check_written)


def _add_judge(kinds: Verbs) -> None:
    judge = add_verb(kinds, "judge", run_eval_judge, "let a language model rate answers against a reference, or vote")
    what = judge.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--questions",
        metavar="Q.jsonl",
        type=file_path,
        help="rate answers to these questions: records with question_id, text, category, image",
    )
    what.add_argument(
        "--votes", metavar="V.jsonl", type=file_path, help="vote on the pairs of answers in this file of people's votes"
    )
    judge.add_argument("--reference", metavar="R.jsonl", type=file_path, help="reference answers to compare with")
    judge.add_argument("--answers", metavar="A.jsonl", type=file_path, help="answers to rate")
    judge.add_argument(
        "--contexts", metavar="C.jsonl", type=file_path, help="captions and boxes that describe the images"
    )
    judge.add_argument(
        "--pictures",
        metavar="DIR",
        type=file_path,
        help="with --votes: folder of kept images, for a judge that accepts images",
    )
    _judge_flags(judge)
    judge.add_argument("--out", metavar="J.jsonl", type=file_path, required=True, help="file for the judge's replies")
    json_flag(judge)
    read = dict.fromkeys(("questions", "votes", "reference", "answers", "contexts"), check_file)
    looks(judge, pictures=check_folder, store=check_kept, out=check_written, **read)


def _judge_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--judge", metavar="NAME", help="name of the judge model on its server")
    store = "file that caches replies, so that no call is sent twice"
    server_flags(parser, store=store, temperature=0.0, taken=("model", "messages", "stream", "n"))


def _judge(arguments: argparse.Namespace) -> Judge:
    from qllava.evaluation.asking import PARAMETERS, Judge

    parameters = PARAMETERS if arguments.parameters is None else arguments.parameters
    return Judge(arguments.judge, arguments.base_url, arguments.store, parameters)


def run_eval_ensemble(arguments: argparse.Namespace) -> int:
    """Run `qllava eval ensemble`: print the accuracy of each model and of the ensemble, and the gain."""
    if (arguments.rule == "judge") != bool(arguments.judge):
        raise InputError(
            "--rule judge and --judge NAME must be used together. Give both, or --rule complement without --judge."
        )
    from qllava.evaluation.ensemble import combine_files

    judge = _judge(arguments) if arguments.judge else None
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


def run_eval_judge(arguments: argparse.Namespace) -> int:
    """Run `qllava eval judge`: print relative scores by category, or write a judge's votes for `eval agreement`."""
    if not arguments.judge:
        raise InputError("--judge is missing. Give the name of the judge model on its server.")
    if arguments.votes and (arguments.reference or arguments.answers):
        raise InputError(
            "--reference and --answers need --questions. Remove them: the file of --votes contains both answers."
        )
    if arguments.questions and not (arguments.reference and arguments.answers):
        raise InputError(
            "--questions needs --answers (the answers to rate) and --reference (the answers to compare with)."
        )
    if arguments.questions and arguments.pictures:
        raise InputError("--pictures needs --votes. To rate answers, describe the images with --contexts.")
    judge = _judge(arguments)

    def run() -> Any:
        if arguments.votes:
            from qllava.evaluation.judge_votes import vote_on_file

            given = {"contexts": arguments.contexts, "pictures": arguments.pictures}
            return vote_on_file(arguments.votes, judge, arguments.out, **given)
        from qllava.evaluation.judge import judge_files

        files = (arguments.questions, arguments.reference, arguments.answers, arguments.contexts)
        return judge_files(*files, judge, arguments.out)

    result = quietly(run, arguments.json)
    print(json.dumps(result.to_json()) if arguments.json else result.text())
    return 0


def run_eval_agreement(arguments: argparse.Namespace) -> int:
    """Run `qllava eval agreement`: print agreement of people and judge, of people with each other, and biases."""
    from qllava.evaluation import pages
    from qllava.evaluation.agreement import compare_files

    report = quietly(lambda: compare_files(arguments.votes, arguments.judgments), arguments.json)
    if arguments.html is not None:
        pages.write(arguments.html, pages.agreement_page(report))
    print(json.dumps(report.to_json()) if arguments.json else pages.agreement_text(report))
    return 0
