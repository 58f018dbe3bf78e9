r"""Write ScienceQA as LLaVA's JSON in both orders, answer first and reason first, to be tuned on and compared.

    python recipes/scienceqa.py --problems problems.json --image_folder images --out rows
    python recipes/ablate.py --config recipes/grids/scienceqa.yaml --out runs/scienceqa \
        --place rows=rows problems=problems.json images=images

The first writes the problems of `--split` (train). The second tunes on each order, asks every checkpoint the test
problems with `qllava eval scienceqa`, and draws the accuracy over steps.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from qllava.config import InputError
from qllava.evaluation.scienceqa import Order, read_problems, training_rows
from qllava.surroundings import prepare_process

ORDERS: tuple[Order, ...] = ("answer-first", "reason-first")


def write_rows(problems: Path, images: Path, split: str, out: Path) -> None:
    """Write `OUT/answer-first.json` and `OUT/reason-first.json`.

    Raises InputError for problems or pictures that cannot be used, and for a folder that cannot be written.
    """
    learned = read_problems(problems, split)
    rows = {order: training_rows(learned, images, order) for order in ORDERS}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for order in ORDERS:
            aside = out / f"{order}.part"
            aside.write_text(json.dumps(rows[order]), encoding="utf-8")
            aside.replace(out / f"{order}.json")
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}); choose another --out.") from error


def command_line() -> argparse.ArgumentParser:
    """What the recipe understands."""
    parser = argparse.ArgumentParser(description="Write ScienceQA as LLaVA's JSON, in both orders.")
    parser.add_argument("--problems", type=Path, required=True, help="ScienceQA's problems.json")
    parser.add_argument("--image_folder", type=Path, required=True, help="its pictures: DIR/train/ID/image.png")
    parser.add_argument("--split", default="train", help="which of the problems (default: train)")
    parser.add_argument("--out", type=Path, required=True, help="a folder for answer-first.json and reason-first.json")
    return parser


def main() -> int:
    """Write the rows; errors that a user can mend are one sentence."""
    given = command_line().parse_args()
    try:
        write_rows(given.problems, given.image_folder, given.split, given.out)
    except InputError as error:
        print(f"qllava: {error}", file=sys.stderr)
        return 1
    print(f"{', '.join(str(given.out / f'{order}.json') for order in ORDERS)}")
    return 0


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
