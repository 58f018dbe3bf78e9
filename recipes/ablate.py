"""Ablation: change one setting at a time, repeat with several seeds, and write a table and a page with intervals.

    python recipes/ablate.py                                   # the first paper's ablations, on nano: three seeds
    python recipes/ablate.py --config mine.yaml --out runs/mine
    python recipes/ablate.py --seeds 1                         # only the first seed; more seeds can be added later

A grid has keys of pretrain_projector.py and finetune_lora.py, and the measurement for `qllava eval`;
`recipes/grids/ablate.yaml` is the default and shows all keys. The same command again runs what is missing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qllava.arguments import Parser, carry_out, check_file, check_written_folder, file_path, looks
from qllava.config import InputError, cache_folder
from qllava.files import whole_folder
from qllava.surroundings import prepare_process

if TYPE_CHECKING:
    from qllava.experiments.ablation import Grid

HERE = Path(__file__).resolve().parent


def run(words: Sequence[str], log: Path) -> str:
    """Run a recipe, or `qllava eval`, as a user would, write its output to `log`, and return its standard output."""
    program = ["-m", "qllava", *words] if words[0] == "eval" else [str(HERE / f"{words[0]}.py"), *words[1:]]
    with log.open("a", encoding="utf-8") as said:
        done = subprocess.run(
            [sys.executable, *program],
            stdout=subprocess.PIPE,
            stderr=said,
            env={**os.environ, "PYTHONIOENCODING": "utf-8:backslashreplace"},  # whatever the system's encoding of pipes
            encoding="utf-8",
            check=False,
        )
        said.write(done.stdout)
    if done.returncode != 0:
        lines = log.read_text(encoding="utf-8").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        raise InputError(
            f"{words[0]} failed ({last.removeprefix('qllava: ').rstrip('.')}); its whole output is in {log}."
        )
    return done.stdout


def small_llama() -> Path:
    """Return the folder of the LLaMA with half of nano's layers, which is trained when it is first needed."""
    from qllava.nano import dataset

    folder = cache_folder() / f"nano-{dataset.VERSION}-small-llama"
    if not folder.is_dir():
        with whole_folder(folder, Path.is_dir) as aside:
            print("Training nano's smaller LLaMA (once). This takes minutes.", file=sys.stderr)
            build = [sys.executable, str(HERE / "build_nano.py"), "--small", "--out", str(aside)]
            if subprocess.run(build, stdout=sys.stderr, check=False).returncode != 0:
                raise InputError("nano's smaller LLaMA could not be trained. See the errors above.")
    return folder


def ablate(grid: Grid, out: Path) -> None:
    """Run what is missing of a grid, and write the table and the report."""
    from qllava.experiments import report as ablation_report
    from qllava.experiments.ablation import run_grid

    page = ablation_report.write(out, grid, run_grid(grid, out, run))
    print((out / "table.md").read_text(encoding="utf-8"))
    print(f"Report: {page}")


def command_line() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(description="Change one thing at a time, repeat by seed, measure all alike.")
    parser.add_argument(
        "--config",
        type=file_path,
        default=HERE / "grids" / "ablate.yaml",
        help="grid of runs (default: grids/ablate.yaml)",
    )
    parser.add_argument(
        "--out", type=file_path, default=Path("runs/ablate"), help="folder for the runs (default: runs/ablate)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="seeds to use instead of those of the grid")
    parser.add_argument(
        "--place", type=_place, nargs="+", metavar="NAME=PATH", default=[], help="value of {NAME} in the grid"
    )
    looks(parser, config=check_file, out=check_written_folder)
    return parser


def _place(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name.isidentifier() and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, Path(path).absolute()


def main(arguments: Sequence[str] | None = None) -> int:
    """Read and run the grid, and return the exit status."""
    prepare_process()
    return carry_out(command_line().parse_args(arguments), _run)


def _run(arguments: argparse.Namespace) -> int:
    from qllava.experiments.ablation import read_grid
    from qllava.nano import dataset, orders

    places = {"nano": lambda: dataset.prepare().folder, "orders": orders.prepare, "small_llama": small_llama}
    places |= {name: path.absolute for name, path in arguments.place}
    grid = read_grid(arguments.config, places)
    ablate(replace(grid, seeds=tuple(arguments.seeds)) if arguments.seeds else grid, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
