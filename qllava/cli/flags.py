"""Helpers shared by the commands of `qllava`: adding a command, common flags, types of flags."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

from qllava.arguments import MODEL_HELP, Parser, check_data, check_folder, check_model, file_path, looks, model_name

T = TypeVar("T")
N = TypeVar("N", int, float)
Verbs: TypeAlias = "argparse._SubParsersAction[Parser]"


def add_verb(verbs: Verbs, verb_name: str, run: Callable[[argparse.Namespace], int], summary: str) -> Parser:
    """Add a command that calls `run`; `summary` is its line in the help."""
    verb = verbs.add_parser(verb_name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    verb.set_defaults(run=run, checks={})
    return verb


def json_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag `--json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")


def reading_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose the tokenizer and processor for reading data, and their checks."""
    image_folder_flag(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--model", metavar="MODEL", type=model_name, default="nano", help=f"{MODEL_HELP}; its weights are not loaded"
    )
    which.add_argument(
        "--tokenizer",
        metavar="T",
        type=file_path,
        help="tokenizer file or folder; images then take as many tokens as in LLaVA-1.5",
    )
    parser.add_argument("--template", choices=("plain", "vicuna_v1", "llama_2", "llama_3", "chatml"))
    parser.add_argument(
        "--max-length",
        metavar="N",
        type=positive,
        default=2048,
        help="maximum number of tokens in a sample (default: 2048)",
    )
    looks(parser, image_folder=check_folder, model=check_model, tokenizer=check_data)


def model_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument MODEL of a command that asks a model."""
    parser.add_argument("model", metavar="MODEL", type=model_name, help=MODEL_HELP)


def image_folder_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag `--image-folder` for data whose image paths are relative to it."""
    parser.add_argument("--image-folder", metavar="DIR", type=file_path, help="folder that image paths are relative to")


def html_flag(parser: argparse._ActionsContainer, what: str) -> None:
    """Add the flag `--html`; `what` says what the page shows."""
    parser.add_argument("--html", metavar="FILE", type=file_path, help=f"write an HTML page with {what}")


def problems_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose the problems of ScienceQA: `--problems` and `--split`."""
    parser.add_argument("--problems", metavar="P.json", type=file_path, required=True, help="ScienceQA's problems.json")
    parser.add_argument("--split", default="test", help="split to evaluate (default: test)")


def server_flags(parser: argparse._ActionsContainer, *, store: str, temperature: float, taken: Sequence[str]) -> None:
    """Add the flags of calls to a language model on a server: `--base-url`, `--store` and `--parameters`.

    Args:
        parser: Parser or group of the command.
        store: Help of `--store`.
        temperature: Default temperature, for the help of `--parameters`.
        taken: Names that `--parameters` must not contain, because qllava sets them itself.
    """
    parser.add_argument(
        "--base-url", metavar="URL", help="URL of an OpenAI-compatible server (default: $OPENAI_BASE_URL, else OpenAI)"
    )
    parser.add_argument("--store", metavar="FILE", type=file_path, help=store)
    about = f'parameters of every call, as JSON (default: {{"temperature": {temperature}, "max_tokens": 1024}})'
    parser.add_argument("--parameters", metavar="JSON", type=_parameters(taken), help=about)


def _parameters(taken: Sequence[str]) -> Callable[[str], dict[str, Any]]:
    """Return a parser of the chat API's parameters that refuses the names in `taken`."""

    def parameters(text: str) -> dict[str, Any]:
        try:
            read = json.loads(text)
            json.dumps(read, ensure_ascii=False, allow_nan=False).encode()  # as it is sent
        except (ValueError, RecursionError) as error:
            raise argparse.ArgumentTypeError(f"expected a JSON object, not {text!a} ({error})") from error
        if not isinstance(read, dict) or not read.keys().isdisjoint(taken):
            raise argparse.ArgumentTypeError(
                f"expected a JSON object of parameters such as temperature, without {', '.join(taken)}, which qllava "
                f"sets itself; got {text}"
            )
        return read

    return parameters


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    return _number(text, int, 1)


def rank(text: str) -> int:
    """Parse an integer of at least 0."""
    return _number(text, int, 0)


def temperature(text: str) -> float:
    """Parse a finite number of at least 0."""
    return _number(text, float, 0)


def _number(text: str, kind: Callable[[str], N], least: int) -> N:
    expected = f"expected a {'whole ' if kind is int else ''}number of at least {least}, not {text}"
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(expected) from None
    if not least <= value < float("inf"):
        raise argparse.ArgumentTypeError(expected)
    return value


def quietly(run: Callable[[], T], as_json: bool) -> T:
    """Call `run`; if `as_json`, redirect to stderr what libraries print on stdout."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        return run()
