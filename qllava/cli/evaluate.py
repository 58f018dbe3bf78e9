"""The verbs `qllava eval ...`: how good a model is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qllava.cli.flags import MODEL_HELP, Verbs, add_verb, json_flag, quietly


def add(verbs: Verbs) -> None:
    """Add `eval` and what it measures."""
    evaluate = verbs.add_parser("eval", help="measure a model", description="Measure a model.")
    kinds = evaluate.add_subparsers(title="evaluations", metavar="EVALUATION", required=True)
    vqa = add_verb(kinds, "vqa", run_eval_vqa, "short answers to questions about pictures, exact match")
    vqa.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    vqa.add_argument("data", metavar="DATA", type=Path, help="LLaVA JSON, or rows of question, image, answer and type")
    vqa.add_argument("--image-folder", metavar="DIR", type=Path, help="where the pictures' names begin")
    vqa.add_argument("--out", metavar="FILE", type=Path, help="write every question with its answer, as JSONL")
    json_flag(vqa)


def run_eval_vqa(arguments: argparse.Namespace) -> int:
    """`qllava eval vqa`: accuracy with its interval, and by type of question."""
    from qllava.evaluation.vqa import evaluate_file

    result = quietly(
        lambda: evaluate_file(arguments.model, arguments.data, image_folder=arguments.image_folder, out=arguments.out),
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
    for name, accuracy in sorted(result["by_type"].items()):
        print(f"  {name:<16}{100 * accuracy:6.1f} %")
    return 0
