"""What the verbs of the command line share: how one is added, flags that several take, numbers that are checked."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias, TypeVar

T = TypeVar("T")
Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

MODEL_HELP = "nano (the newest finished nano run), a run folder, a merged folder, or a hub name"


def add_verb(
    verbs: Verbs, name: str, run: Callable[[argparse.Namespace], int], summary: str
) -> argparse.ArgumentParser:
    """A verb that `run` carries out; `summary` is its line in the help."""
    verb = verbs.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    verb.set_defaults(run=run)
    return verb


def json_flag(parser: argparse.ArgumentParser) -> None:
    """`--json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")


def reading_flags(parser: argparse.ArgumentParser) -> None:
    """Which model will read the data; nano's own parts where nothing is said."""
    parser.add_argument("--image-folder", metavar="DIR", type=Path, help="where the pictures' names begin")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="MODEL", default="nano", help=f"{MODEL_HELP}; its weights are not loaded")
    which.add_argument(
        "--tokenizer", metavar="T", type=Path, help="a tokenizer's file or folder; pictures then count as LLaVA-1.5's"
    )
    parser.add_argument("--template", choices=("plain", "vicuna_v1", "llama_2", "llama_3", "chatml"))
    parser.add_argument("--max-length", metavar="N", type=positive, default=2048, help="(default: 2048)")


def base_flag(parser: argparse.ArgumentParser) -> None:
    """`--base-model`."""
    parser.add_argument(
        "--base-model",
        metavar="DIR",
        nargs="+",
        default=[],
        help="where the base of a run is now, if it has moved; checked by its fingerprint",
    )


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, not {text}")
    return value


def rank(text: str) -> int:
    """A whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, not {text}")
    return value


def temperature(text: str) -> float:
    """A number of at least 0, and finite."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, not {text}")
    return value


def quietly(run: Callable[[], T], as_json: bool) -> T:
    """Run, with what libraries print on stdout sent to stderr when stdout belongs to the JSON."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        return run()
