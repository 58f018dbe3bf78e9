"""The commands `qllava eval vqa` and `qllava eval scienceqa`: measure a model's accuracy."""

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
from qllava.cli.flags import (
    Verbs,
    add_verb,
    html_flag,
    image_folder_flag,
    json_flag,
    model_argument,
    positive,
    problems_flags,
    quietly,
    rank,
)
from qllava.config import InputError


def add(verbs: Verbs) -> None:
    """Add `qllava eval` and its evaluations."""
    evaluate = verbs.add_parser("eval", help="measure a model", description="Measure a model.")
    kinds = evaluate.add_subparsers(title="evaluations", metavar="EVALUATION", required=True)
    vqa = add_verb(kinds, "vqa", run_eval_vqa, "exact-match accuracy on short questions about images")
    model_argument(vqa)
    vqa.add_argument(
        "data", metavar="DATA", type=file_path, help="LLaVA JSON, or records with question, image, answer and type"
    )
    image_folder_flag(vqa)
    vqa.add_argument(
        "--out", metavar="FILE", type=file_path, help="write every question and its answer to this JSONL file"
    )
    html_flag(vqa, "the wrong answers and their images")
    vqa.add_argument(
        "--shots",
        metavar="K",
        type=rank,
        default=0,
        help="number of worked examples to show before each question (default: 0)",
    )
    vqa.add_argument(
        "--pool",
        metavar="DATA",
        type=file_path,
        help="file to choose the examples for --shots from; same formats as DATA",
    )
    vqa.add_argument(
        "--choose",
        choices=("random", "text", "picture"),
        default="random",
        help="choose examples at random (default), by similar question, or by similar image",
    )
    vqa.add_argument("--seed", metavar="N", type=int, default=0, help="random seed for --choose random (default: 0)")
    vqa.add_argument(
        "--read", metavar="PATTERN", help="regular expression with one group that extracts the short answer"
    )
    _batch_flag(vqa)
    base_flag(vqa)
    json_flag(vqa)
    written = {"out": check_written, "html": check_written}
    looks(vqa, data=check_data, image_folder=check_folder, pool=check_data, **written, model=check_finished)
    _add_scienceqa(kinds)
    judging.add(kinds)


def _add_scienceqa(kinds: Verbs) -> None:
    science = add_verb(kinds, "scienceqa", run_eval_scienceqa, "accuracy on ScienceQA, by subject, context and grade")
    problems_flags(science)
    whose = science.add_mutually_exclusive_group(required=True)
    whose.add_argument(
        "--answers", metavar="A.jsonl", type=file_path, help="score these answers: records with question_id and text"
    )
    whose.add_argument(
        "--model", metavar="MODEL", type=model_name, help=f"model that answers the questions: {MODEL_HELP}"
    )
    science.add_argument(
        "--image-folder", metavar="DIR", type=file_path, help="folder of images, named DIR/ID/image.png"
    )
    science.add_argument(
        "--out",
        metavar="A.jsonl",
        type=file_path,
        help="file for the model's answers; running the same command again resumes from it",
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
        help="maximum number of questions per batch (default: as many as fit into memory, at most 32)",
    )


def run_eval_vqa(arguments: argparse.Namespace) -> int:
    """Run `qllava eval vqa`: print accuracy with its confidence interval, in total and by question type."""
    if bool(arguments.shots) != bool(arguments.pool):
        raise InputError("--shots K and --pool DATA must be used together. Give both or neither.")
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
        f"Accuracy: {100 * result['accuracy']:.1f} %, {result['correct']} of {result['n']} answers are correct "
        f"(95 % confidence interval {100 * low:.1f} to {100 * high:.1f} %)."
    )
    if arguments.read:
        print(f"{result['unread']} answers did not match --read and count as wrong.")
    for name, accuracy in sorted(result["by_type"].items()):
        low, high = result["by_type_ci95"][name]
        print(f"  {name:<16}{100 * accuracy:6.1f} %  ({100 * low:.1f} to {100 * high:.1f} %)")
    return 0


def run_eval_scienceqa(arguments: argparse.Namespace) -> int:
    """Run `qllava eval scienceqa`: print accuracy in total and by group, and the number of unreadable answers."""
    if arguments.model and not arguments.out:
        raise InputError("--model needs --out. Give the file for the model's answers.")
    if arguments.answers and (arguments.out or arguments.image_folder or arguments.batch_size):
        raise InputError(
            "--out, --image-folder and --batch-size need --model. Remove them, or give --model instead of --answers."
        )
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
