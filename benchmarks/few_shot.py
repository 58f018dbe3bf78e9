"""Benchmark of in-context learning: accuracy with 0, 1, 2 and 4 examples per question, by how they are chosen.

    python benchmarks/few_shot.py runs/finetune_lora --out benchmarks/results/few_shot.json

The questions are nano's test questions; the examples are its validation questions, which were not trained on. Every
line has the accuracy with its confidence interval and, compared with no examples, how many questions were gained and
lost. The benchmark also measures how many answers are the same in batches and one at a time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.machine import provenance
from benchmarks.tables import format_table
from qllava.data.formats import Example, read_examples
from qllava.evaluation.shots import Choose, Shots, with_shots
from qllava.evaluation.vqa import VqaResult, evaluate, is_correct, truth
from qllava.inference import Chat, load
from qllava.nano import dataset
from qllava.surroundings import prepare_process

COUNTS = (1, 2, 4)


def measure(chat: Chat, examples: Sequence[Example], pool: Sequence[Example]) -> list[dict[str, Any]]:
    """Return a line without examples, and one for each way of choosing them and each number of them."""
    without = evaluate(chat, examples, batch_size=50)
    lines = [_line("none", 0, without, examples, without)]
    for choose in get_args(Choose):
        for count in COUNTS:
            asked = with_shots(examples, Shots(count, pool, choose), chat)
            found = evaluate(chat, asked, batch_size=50)
            lines.append(_line(choose, count, found, examples, without))
            print(json.dumps(lines[-1]), file=sys.stderr, flush=True)
    return lines


def same_in_batches(chat: Chat, examples: Sequence[Example]) -> dict[str, Any]:
    """Return how many answers are exactly the same in batches of 50 and one at a time."""
    batched, single = (evaluate(chat, examples, batch_size=size).answers for size in (50, 1))
    return {"questions": len(examples), "same": sum(a == b for a, b in zip(batched, single, strict=True))}


def _line(choose: str, shots: int, found: VqaResult, examples: Sequence[Example], without: VqaResult) -> dict[str, Any]:
    right, before = (
        [is_correct(answer, truth(example)) for example, answer in zip(examples, one.answers, strict=True)]
        for one in (found, without)
    )
    return {
        "choose": choose,
        "shots": shots,
        "accuracy": found.accuracy,
        "low": found.ci95[0],
        "high": found.ci95[1],
        "gained": sum(now and not then for now, then in zip(right, before, strict=True)),
        "lost": sum(then and not now for now, then in zip(right, before, strict=True)),
        "by_type": found.by_type,
    }


def main() -> int:
    """Measure, print a table and, with --out, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a finished nano run, or a model merged from one")
    parser.add_argument("--questions", type=int, help="number of questions to ask, from the first (default: all)")
    parser.add_argument("--out", type=Path, help="file to write the figures to, as JSON")
    arguments = parser.parse_args()
    data = dataset.prepare()
    examples = read_examples(data.test, data.folder)[: arguments.questions]
    pool = read_examples(data.validation, data.folder)
    chat = load(arguments.run)
    batched = same_in_batches(chat, [*examples, *read_examples(data.unseen, data.folder)[: arguments.questions]])
    print(f"{batched['same']} of {batched['questions']} answers are the same in batches of 50 and one at a time.")
    lines = measure(chat, examples, pool)
    print(format_table([{key: value for key, value in line.items() if key != "by_type"} for line in lines]))
    if arguments.out:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        figures = {**provenance(device), "questions": len(examples), "batched": batched, "lines": lines}
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
