"""The verbs `qllava eval ...`: how good a model is."""

from __future__ import annotations

import argparse
import json
from typing import Any

from qllava.arguments import (
    MODEL_HELP,
    base_flag,
    check_data,
    check_file,
    check_finished,
    check_folder,
    check_written,
    file_path,
    looks,
    model_name,
)
from qllava.cli import judging
from qllava.cli.flags import Verbs, add_verb, json_flag, positive, quietly, rank
from qllava.config import InputError


def add(verbs: Verbs) -> None:
    """Add `eval` and what it measures."""
    evaluate = verbs.add_parser("eval", help="measure a model", description="Measure a model.")
    kinds = evaluate.add_subparsers(title="evaluations", metavar="EVALUATION", required=True)
    vqa = add_verb(kinds, "vqa", run_eval_vqa, "short answers to questions about images, exact match")
    vqa.add_argument("model", metavar="MODEL", type=model_name, help=MODEL_HELP)
    vqa.add_argument(
        "data", metavar="DATA", type=file_path, help="LLaVA JSON, or examples of question, image, answer and type"
    )
    vqa.add_argument("--image-folder", metavar="DIR", type=file_path, help="folder that image paths are relative to")
    vqa.add_argument("--out", metavar="FILE", type=file_path, help="write every question with its answer, as JSONL")
    vqa.add_argument("--html", metavar="FILE", type=file_path, help="write a page with the failures and their images")
    vqa.add_argument(
        "--shots", metavar="K", type=rank, default=0, help="number of examples before each question (default: 0)"
    )
    vqa.add_argument(
        "--pool",
        metavar="DATA",
        type=file_path,
        help="file that examples for --shots are chosen from, in a format of DATA",
    )
    vqa.add_argument(
        "--choose",
        choices=("random", "text", "picture"),
        default="random",
        help="examples at random (default), with similar questions, or with similar images",
    )
    vqa.add_argument("--seed", metavar="N", type=int, default=0, help="of examples at random (default: 0)")
    vqa.add_argument(
        "--read", metavar="PATTERN", help="what of a long answer counts: a regular expression with one group"
    )
    _batch_flag(vqa)
    base_flag(vqa)
    json_flag(vqa)
    written = {"out": check_written, "html": check_written}
    looks(vqa, data=check_data, image_folder=check_folder, pool=check_data, **written, model=check_finished)
    _add_scienceqa(kinds)
    judging.add(kinds)


def _add_scienceqa(kinds: Verbs) -> None:
    science = add_verb(kinds, "scienceqa", run_eval_scienceqa, "ScienceQA, by subject, context and grade")
    science.add_argument(
        "--problems", metavar="P.json", type=file_path, required=True, help="ScienceQA's problems.json"
    )
    science.add_argument("--split", default="test", help="which of the problems (default: test)")
    whose = science.add_mutually_exclusive_group(required=True)
    whose.add_argument(
        "--answers", metavar="A.jsonl", type=file_path, help="answers that were given: question_id and text"
    )
    whose.add_argument("--model", metavar="MODEL", type=model_name, help=f"who answers: {MODEL_HELP}")
    science.add_argument("--image-folder", metavar="DIR", type=file_path, help="with the images, as DIR/ID/image.png")
    science.add_argument(
        "--out",
        metavar="A.jsonl",
        type=file_path,
        help="where the model's answers go; the same command resumes from it",
    )
    _batch_flag(science)
    science.add_argument("--order", choices=("answer-first", "reason-first"), default="reason-first")
    base_flag(science)
    json_flag(science)
    read = {"problems": check_file, "answers": check_file}
    looks(science, image_folder=check_folder, out=check_written, **read, model=check_finished)


def _batch_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=positive,
        help="maximum number of questions to ask at once (default: as many as fit into memory, at most 32)",
    )


def run_eval_vqa(arguments: argparse.Namespace) -> int:
    """`qllava eval vqa`: accuracy with its interval, and by type of question."""
    if bool(arguments.shots) != bool(arguments.pool):
        raise InputError("--shots K and --pool DATA belong together; give both or neither.")
    from qllava.evaluation.vqa import evaluate_file

    result = quietly(
        lambda: evaluate_file(
            arguments.model,
            arguments.data,
            image_folder=arguments.image_folder,
            out=arguments.out,
            html=arguments.html,
            shots=arguments.shots,
            pool=arguments.pool,
            choose=arguments.choose,
            seed=arguments.seed,
            read=arguments.read,
            base_model=arguments.base_model,
            batch_size=arguments.batch_size,
        ),
        arguments.json,
    )
    if arguments.json:
        print(json.dumps(result))
        return 0
    low, high = result["ci95"]
    print(
        f"{100 * result['accuracy']:.1f} % right: {result['correct']} of {result['n']} "
        f"(95 % interval {100 * low:.1f} to {100 * high:.1f} %)"
    )
    if arguments.read:
        print(f"{result['unread']} answers could not be read, and count as wrong.")
    for name, accuracy in sorted(result["by_type"].items()):
        low, high = result["by_type_ci95"][name]
        print(f"  {name:<16}{100 * accuracy:6.1f} %  ({100 * low:.1f} to {100 * high:.1f} %)")
    return 0


def run_eval_scienceqa(arguments: argparse.Namespace) -> int:
    """`qllava eval scienceqa`: accuracy in all, with an image and by group, and what could not be read."""
    if arguments.model and not arguments.out:
        raise InputError("Name the file for the model's answers with --out.")
    if arguments.answers and (arguments.out or arguments.image_folder or arguments.batch_size):
        raise InputError("--out, --image-folder and --batch-size belong to --model; with --answers nothing is asked.")
    from qllava.evaluation.scienceqa import answer_problems, score_file

    def run() -> Any:
        if arguments.answers:
            return score_file(arguments.problems, arguments.answers, split=arguments.split)
        return answer_problems(
            arguments.model,
            arguments.problems,
            arguments.image_folder,
            arguments.out,
            arguments.order,
            split=arguments.split,
            batch_size=arguments.batch_size,
            base_model=arguments.base_model,
        )

    result = quietly(run, arguments.json)
    print(json.dumps(result.to_json()) if arguments.json else result.text())
    return 0
