"""The verbs `qllava eval ...` that weigh answers against each other: ensemble, judge, agreement."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from qllava.arguments import check_file, check_folder, check_kept, check_written, file_path, looks
from qllava.cli.flags import Verbs, add_verb, json_flag, parameters_flag, quietly
from qllava.config import InputError

if TYPE_CHECKING:
    from qllava.evaluation.asking import Judge


def add(kinds: Verbs) -> None:
    """Add these evaluations to `eval`."""
    ensemble = add_verb(kinds, "ensemble", run_eval_ensemble, "two sets of ScienceQA answers as one, and what it gains")
    ensemble.add_argument(
        "--problems", metavar="P.json", type=file_path, required=True, help="ScienceQA's problems.json"
    )
    ensemble.add_argument("--split", default="test", help="which of the problems (default: test)")
    ensemble.add_argument("--answers", metavar="A.jsonl", type=file_path, required=True, help="of the first")
    ensemble.add_argument("--partner", metavar="B.jsonl", type=file_path, required=True, help="of the second")
    ensemble.add_argument(
        "--rule",
        choices=("complement", "judge"),
        required=True,
        help="complement: the partner where the first cannot be read; judge: a model decides where they differ",
    )
    _judge_flags(ensemble)
    json_flag(ensemble)
    looks(ensemble, problems=check_file, answers=check_file, partner=check_file, store=check_kept)
    _add_judge(kinds)
    agreement = add_verb(kinds, "agreement", run_eval_agreement, "does a judge decide as people do, with intervals")
    agreement.add_argument(
        "--votes", metavar="V.jsonl", type=file_path, required=True, help="people's, as the demo wrote"
    )
    agreement.add_argument(
        "--judgments",
        metavar="J.jsonl",
        type=file_path,
        required=True,
        help="the judge's, by `qllava eval judge --votes`",
    )
    agreement.add_argument("--html", metavar="FILE", type=file_path, help="write a page with a plot")
    json_flag(agreement)
    looks(agreement, votes=check_file, judgments=check_file, html=check_written)


def _add_judge(kinds: Verbs) -> None:
    judge = add_verb(kinds, "judge", run_eval_judge, "a language model rates answers beside a reference, or votes")
    what = judge.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--questions", metavar="Q.jsonl", type=file_path, help="rate answers: question_id, text, category, image"
    )
    what.add_argument(
        "--votes", metavar="V.jsonl", type=file_path, help="vote on the pairs of answers that people voted on"
    )
    judge.add_argument("--reference", metavar="R.jsonl", type=file_path, help="the answers to be compared with")
    judge.add_argument("--answers", metavar="A.jsonl", type=file_path, help="the answers to be rated")
    judge.add_argument("--contexts", metavar="C.jsonl", type=file_path, help="the images in captions and boxes")
    judge.add_argument(
        "--pictures", metavar="DIR", type=file_path, help="with --votes, for a judge that sees: kept images"
    )
    _judge_flags(judge)
    judge.add_argument("--out", metavar="J.jsonl", type=file_path, required=True, help="where every reply is written")
    json_flag(judge)
    read = dict.fromkeys(("questions", "votes", "reference", "answers", "contexts"), check_file)
    looks(judge, pictures=check_folder, store=check_kept, out=check_written, **read)


def _judge_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--judge", metavar="NAME", help="a model's name, as its server calls it")
    parser.add_argument("--base-url", metavar="URL", help="an OpenAI-compatible server (default: OPENAI_BASE_URL)")
    parser.add_argument(
        "--store",
        metavar="FILE",
        type=file_path,
        help="where replies are kept, so that none is asked twice (the cache)",
    )
    parameters_flag(parser, 0.0, ("model", "messages", "stream", "n"))


def _judge(arguments: argparse.Namespace) -> Judge:
    from qllava.evaluation.asking import PARAMETERS, Judge

    parameters = PARAMETERS if arguments.parameters is None else arguments.parameters
    return Judge(arguments.judge, arguments.base_url, arguments.store, parameters)


def run_eval_ensemble(arguments: argparse.Namespace) -> int:
    """`qllava eval ensemble`: accuracy of both and of the two together, who helped where, and the gain."""
    if (arguments.rule == "judge") != bool(arguments.judge):
        raise InputError("--rule judge and --judge NAME belong together; give both, or --rule complement alone.")
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
    """`qllava eval judge`: relative scores by category, or a judge's votes for `eval agreement`."""
    if not arguments.judge:
        raise InputError("Name the judge with --judge, as its server calls it.")
    if arguments.votes and (arguments.reference or arguments.answers):
        raise InputError("--reference and --answers belong to --questions; with --votes both answers are in the votes.")
    if arguments.questions and not (arguments.reference and arguments.answers):
        raise InputError("To rate answers, name them with --answers and what they are compared with by --reference.")
    if arguments.questions and arguments.pictures:
        raise InputError("--pictures belongs to --votes; answers are rated by the images' --contexts.")
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
    """`qllava eval agreement`: people against the judge, people against people, and the judge's biases."""
    from qllava.evaluation import pages
    from qllava.evaluation.agreement import compare_files

    report = quietly(lambda: compare_files(arguments.votes, arguments.judgments), arguments.json)
    if arguments.html is not None:
        pages.write(arguments.html, pages.agreement_page(report))
    print(json.dumps(report.to_json()) if arguments.json else pages.agreement_text(report))
    return 0
