"""Checks of a command line before torch is imported: flags, files, folders, models and packages.

All checks take milliseconds. They find errors that are certain; other errors are found later, by the code that is
reading a file or loading a model.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

from qllava.config import NANO, InputError, expanded
from qllava.runs import RUNS, Run, folder_of
from qllava.spelling import close_to, meant, neighbour, suggestion

MODEL_HELP = "nano (the newest finished nano run), a run folder, a merged model's folder, or a hub name"
"""Help text for an argument that names a model for chat."""


class Parser(argparse.ArgumentParser):
    """An argument parser that accepts no abbreviations and suggests a flag for an unknown one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse like argparse, but exit at an unknown argument here, where the flags of the command are known."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            word = str(rest[0]).split("=")[0]
            if not word.startswith("-"):
                self.error(f"unexpected argument {word}; see --help.")
            known = [flag.lstrip("-") for action in self._actions for flag in action.option_strings]
            self.error(f"unknown argument {word}{suggestion(word.lstrip('-'), known, '--')}")
        return found, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Check a choice (or command name) like argparse, and suggest a close one."""
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            name = meant(str(value), [str(one) for one in action.choices or ()])
            if name is None:
                raise
            raise argparse.ArgumentError(action, f"{error.message}; did you mean {name}?") from error


def file_path(text: str) -> Path:
    """Parse a path and expand `~`; refuse a URL, which would lose one of its slashes as a path."""
    if is_address(text):
        raise argparse.ArgumentTypeError(f"{text} is a URL; download it and give the local file or folder")
    return Path(expanded(text))


def model_name(text: str) -> str:
    """Parse a model or data set: a folder or a hub name; expand `~`."""
    return expanded(text)


def is_address(text: str) -> bool:
    """Return whether a text is a URL."""
    return re.match(r"[a-zA-Z][\w+.-]*://", text) is not None


def looks_like_a_path(text: str) -> bool:
    """Return whether a name cannot be a hub name, which has the form NAME or OWNER/NAME."""
    return text.startswith((".", "/", "~", f"{RUNS}/")) or text.endswith("/") or "\\" in text or text.count("/") > 1


def check_data(text: str | Path, what: str) -> None:
    """Raise InputError if a file or folder of data does not exist or is a URL."""
    if is_address(str(text)):
        raise InputError(f"{what}: {text} is a URL. Download it and give the local file or folder.")
    _check_there(Path(expanded(str(text))), what)


def check_folder(text: str | Path, what: str) -> None:
    """Raise InputError if a folder does not exist or is a file."""
    check_data(text, what)
    if not Path(expanded(str(text))).is_dir():
        raise InputError(f"{what}: {text} is not a folder. Give a folder.")


def check_file(text: str | Path, what: str) -> None:
    """Raise InputError if a file does not exist or is a folder."""
    check_data(text, what)
    if Path(expanded(str(text))).is_dir():
        raise InputError(f"{what}: {text} is a folder. Give a file.")


def check_model(text: str, what: str) -> None:
    """Raise InputError if a name cannot be a model: a missing folder, a file, a URL.

    A name that may be a hub name passes.
    """
    if text == NANO:
        return
    if is_address(text):
        found = re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", text)
        better = f"Its hub name is {found[1]}" if found else "Give a folder or a hub name (OWNER/NAME)"
        raise InputError(f"{what}: {text} is a URL. {better}.")
    folder = Path(expanded(text))
    if folder.is_dir():
        if not any(folder.iterdir()):
            raise InputError(f"{what}: the folder {text} is empty. Give the folder of a model.")
        if said := Run(folder).unfinished:
            raise InputError(f"{what}: {said}")
    elif folder.exists():
        raise InputError(f"{what}: {text} is a file. Give the folder of the model.")
    elif said := no_folder(text):
        raise InputError(f"{what}: {said}")


def no_folder(text: str) -> str | None:
    """Return a message if a model's name has no local folder; None if it may be a hub name."""
    near = NANO if close_to(text, [NANO]) else neighbour(Path(expanded(text)), folders=True)
    if near:
        return f"{text} does not exist. Did you mean {near}?"
    if looks_like_a_path(text):
        return f"{text} does not exist. Give the folder of a model or a hub name."
    return None


def check_finished(text: str, what: str) -> None:
    """Check like `check_model`, and require a model that answers: a finished run for `nano`, and no stage 1 run."""
    check_model(text, what)
    if said := Run(folder_of(text)).without_model:
        raise InputError(f"{what}: {said}")


def check_run(text: str | Path, what: str) -> None:
    """Check like `check_folder`, and require a run or checkpoint with an adapter."""
    check_folder(text, what)
    if said := Run(Path(text)).without_model:
        raise InputError(f"{what}: {said}")


def check_part(text: str, what: str) -> None:
    """Check like `check_model`, and also accept a vision tower of open_clip."""
    if not text.startswith("open_clip:"):
        check_model(text, what)


def check_written_folder(text: str | Path, what: str) -> None:
    """Check like `check_written`, for a folder that will be created with its parents."""
    check_written(text, what, folder=True)


def check_kept(text: str | Path, what: str) -> None:
    """Check like `check_written`, for a file whose folder will be created if missing."""
    check_written(text, what, made=True)


def check_written(text: str | Path, what: str, *, folder: bool = False, made: bool = False) -> None:
    """Raise InputError if an output file or folder cannot be created.

    Args:
        text: The file or folder.
        what: The flag or setting, for the message.
        folder: Whether the output is a folder, which is created with its parents.
        made: Whether the folder of a file is created too; otherwise it must exist.
    """
    if is_address(str(text)):
        raise InputError(f"{what}: {text} is a URL. Give a local path.")
    place = Path(expanded(str(text)))
    if folder and place.exists() and not place.is_dir():
        raise InputError(f"{what}: {text} is a file. Give a folder.")
    if not folder and place.is_dir():
        raise InputError(f"{what}: {text} is a folder. Give a file.")
    above = place if place.exists() else place.parent
    if not folder and not made and not above.exists():
        raise InputError(
            f"{what}: {text} cannot be written, because the folder {above} does not exist. Create it first."
        )
    while not above.exists():
        above = above.parent
    if above.is_file() and above != place:
        raise InputError(f"{what}: {text} cannot be written, because {above} is a file. Give another path.")
    if not os.access(above, os.W_OK | (os.X_OK if above.is_dir() else 0)):
        read_only = bool(os.statvfs(above).f_flag & os.ST_RDONLY) if hasattr(os, "statvfs") else False
        reason = os.strerror(errno.EROFS if read_only else errno.EACCES)
        raise InputError(f"{what}: {text} cannot be written ({reason}). Give another path.")


def missing(modules: Iterable[str]) -> list[str]:
    """Return the modules that are not installed; import only their parent packages."""
    return [module for module in modules if not _is_installed(module)]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # the parent package is missing, or was removed from `sys.modules`
        return False


def _check_there(place: Path, what: str) -> None:
    try:
        place.stat()
    except OSError as error:
        absent = error.errno in (errno.ENOENT, errno.ENOTDIR)
        reason = "does not exist" if absent else f"cannot be read ({error.strerror})"
        near = neighbour(place) if absent else None
        advice = f"Did you mean {near}?" if near else "Check the path."
        raise InputError(f"{what}: {place} {reason}. {advice}") from error


Check: TypeAlias = Callable[[Any, str], None]


def looks(parser: argparse.ArgumentParser, **checks: Check) -> None:
    """Register a check for arguments of a parser, by `dest`; `check_arguments` runs the checks."""
    labels = {a.dest: a.option_strings[0] if a.option_strings else str(a.metavar or a.dest) for a in parser._actions}
    known = parser.get_default("checks") or {}
    parser.set_defaults(checks=known | {labels[dest]: (dest, check) for dest, check in checks.items()})


def base_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag `--base-model` and its check."""
    parser.add_argument(
        "--base-model",
        metavar="DIR",
        type=model_name,
        nargs="+",
        default=[],
        help="new location of the run's base model, if it has moved; checked by its fingerprint",
    )
    looks(parser, base_model=check_part)


def loading_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how a model for chat is loaded, `--dtype` and `--base-model`, and their check.

    `--load-in-4bit` is not among them: its default differs between the terminal and the demo.
    """
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="type of the weights (default: by device)"
    )
    base_flag(parser)


def sampling_flag(parser: argparse.ArgumentParser, temperature: str) -> None:
    """Add the flag `--sampling`; `temperature` is what the help calls the value that the user sets."""
    parser.add_argument(
        "--sampling",
        choices=("asked", "recommended"),
        default="asked",
        help=f"asked: use only {temperature} (default); recommended: use the model's own sampling values",
    )


def votes_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag `--votes`."""
    parser.add_argument(
        "--votes",
        metavar="FILE",
        type=file_path,
        default=Path("votes.jsonl"),
        help="file for the votes (default: votes.jsonl)",
    )


def check_arguments(arguments: argparse.Namespace) -> None:
    """Run the registered checks of a parsed command line.

    Raises:
        InputError: For the first argument that fails its check.
    """
    for label, (dest, check) in arguments.checks.items():
        value = getattr(arguments, dest)
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                check(one, label)


def carry_out(arguments: argparse.Namespace, run: Callable[[argparse.Namespace], int]) -> int:
    """Check the arguments of a program, and run it.

    Returns:
        The exit status: 1 for an error that a user can correct, which is printed on stderr.
    """
    try:
        check_arguments(arguments)
        return run(arguments)
    except (InputError, OSError) as error:
        print(f"qllava: {explain(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("qllava: interrupted", file=sys.stderr)
        return 130


def explain(error: InputError | OSError) -> str:
    """Return one sentence: the message of an InputError, or the file and reason of an OSError."""
    if isinstance(error, InputError):
        return str(error)
    named = error.filename or "A file"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return f"{named} does not exist."
    return f"{named} cannot be read or written: {error.strerror or error}."
