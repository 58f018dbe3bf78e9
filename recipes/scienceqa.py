r"""Write ScienceQA as LLaVA's JSON in both orders, answer first and reason first, for finetuning and comparison.

    python recipes/scienceqa.py --problems problems.json --image_folder images --out rows
    python recipes/ablate.py --config recipes/grids/scienceqa.yaml --out runs/scienceqa \
        --place rows=rows problems=problems.json images=images

The first command writes the problems of `--split` (train). The second finetunes on each order, answers the test
problems with every checkpoint by `qllava eval scienceqa`, and plots the accuracy over steps.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qllava.arguments import Parser, carry_out, check_file, check_folder, check_written_folder, file_path, looks
from qllava.config import InputError
from qllava.files import write_whole
from qllava.surroundings import prepare_process

if TYPE_CHECKING:
    from qllava.evaluation.scienceqa import Order

ORDERS: tuple[Order, ...] = ("answer-first", "reason-first")


def write_records(problems: Path, images: Path, split: str, out: Path) -> None:
    """Write `OUT/answer-first.json` and `OUT/reason-first.json`.

    Raises:
        InputError: Problems or images cannot be used, or the folder cannot be written.
    """
    from qllava.evaluation.scienceqa import read_problems, training_records

    learned = read_problems(problems, split)
    rows = {order: training_records(learned, images, order) for order in ORDERS}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for order in ORDERS:
            write_whole(out / f"{order}.json", json.dumps(rows[order]))
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}). Give another --out.") from error


def command_line() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(description="Write ScienceQA as LLaVA's JSON, in both orders.")
    parser.add_argument("--problems", type=file_path, required=True, help="ScienceQA's problems.json")
    parser.add_argument(
        "--image_folder", type=file_path, required=True, help="folder of ScienceQA's images: DIR/train/ID/image.png"
    )
    parser.add_argument("--split", default="train", help="split to convert (default: train)")
    out = "folder for answer-first.json and reason-first.json"
    parser.add_argument("--out", type=file_path, required=True, help=out)
    looks(parser, problems=check_file, image_folder=check_folder, out=check_written_folder)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the examples and return the exit status."""
    prepare_process()
    return carry_out(command_line().parse_args(arguments), _run)


def _run(given: argparse.Namespace) -> int:
    write_records(given.problems, given.image_folder, given.split, given.out)
    print(f"{', '.join(str(given.out / f'{order}.json') for order in ORDERS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
