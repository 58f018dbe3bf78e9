"""What a command line names, looked at before torch is imported: flags, files, folders, models and packages.

Everything here takes milliseconds. It finds what is certainly wrong; what only reading a file or loading a model can
show is found later, by what reads it.
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

MODEL_HELP = "nano (the newest finished nano run), a run folder, a merged folder, or a hub name"
"""A model that answers, for the help."""


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations, and says which flag an unknown one may have been."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, but an unknown argument ends the process here, where the flags of the verb are known."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            word = str(rest[0]).split("=")[0]
            if not word.startswith("-"):
                self.error(f"unexpected argument {word}; see --help.")
            known = [flag.lstrip("-") for action in self._actions for flag in action.option_strings]
            self.error(f"unknown argument {word}{suggestion(word.lstrip('-'), known, '--')}")
        return found, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """As argparse, of a command too, but a choice that is close to the wrong one is suggested."""
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            name = meant(str(value), [str(one) for one in action.choices or ()])
            if name is None:
                raise
            raise argparse.ArgumentError(action, f"{error.message}; did you mean {name}?") from error


def file_path(text: str) -> Path:
    """A flag's path, `~` expanded. An address is refused: as a path it would lose one of its slashes."""
    if is_address(text):
        raise argparse.ArgumentTypeError(f"{text} is an address on the web; download it, and give the file or folder")
    return Path(expanded(text))


def model_name(text: str) -> str:
    """A flag's model or data set, which is a folder or a name on the hub; `~` expanded."""
    return expanded(text)


def is_address(text: str) -> bool:
    """Whether a text is a URL."""
    return re.match(r"[a-zA-Z][\w+.-]*://", text) is not None


def looks_like_a_path(text: str) -> bool:
    """Whether a name cannot be one on the hub, which has the form NAME or OWNER/NAME."""
    return text.startswith((".", "/", "~", f"{RUNS}/")) or text.endswith("/") or "\\" in text or text.count("/") > 1


def check_data(text: str | Path, what: str) -> None:
    """Raise InputError when a file or folder of data does not exist, or is an address."""
    if is_address(str(text)):
        raise InputError(f"{what}: {text} is an address on the web; download it, and give the file or folder.")
    _check_there(Path(expanded(str(text))), what)


def check_folder(text: str | Path, what: str) -> None:
    """Raise InputError when a folder does not exist, or is a file."""
    check_data(text, what)
    if not Path(expanded(str(text))).is_dir():
        raise InputError(f"{what}: {text} is not a folder; give the folder.")


def check_file(text: str | Path, what: str) -> None:
    """Raise InputError when a file does not exist, or is a folder."""
    check_data(text, what)
    if Path(expanded(str(text))).is_dir():
        raise InputError(f"{what}: {text} is a folder; give a file.")


def check_model(text: str, what: str) -> None:
    """Raise InputError for a model that cannot be one: a missing folder, a file, an address.

    A name that may be one on the hub passes.
    """
    if text == NANO:
        return
    if is_address(text):
        found = re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", text)
        better = f"its name on the hub is {found[1]}" if found else "give a folder, or a name on the hub (OWNER/NAME)"
        raise InputError(f"{what}: {text} is an address; {better}.")
    folder = Path(expanded(text))
    if folder.is_dir():
        if not any(folder.iterdir()):
            raise InputError(f"{what}: the folder {text} is empty; give a folder that holds a model.")
        if said := Run(folder).unfinished:
            raise InputError(f"{what}: {said}")
    elif folder.exists():
        raise InputError(f"{what}: {text} is a file; give the folder that holds the model.")
    elif said := no_folder(text):
        raise InputError(f"{what}: {said}")


def no_folder(text: str) -> str | None:
    """Return what to say where a model's name has no folder here; None where it may be a name on the hub."""
    near = NANO if close_to(text, [NANO]) else neighbour(Path(expanded(text)), folders=True)
    if near:
        return f"{text} does not exist; did you mean {near}?"
    if looks_like_a_path(text):
        return f"{text} does not exist; give a folder that holds a model, or a name on the hub."
    return None


def check_finished(text: str, what: str) -> None:
    """As `check_model`, for a model that answers: of `nano` a run has to be finished; no pretraining."""
    check_model(text, what)
    if said := Run(folder_of(text)).without_model:
        raise InputError(f"{what}: {said}")


def check_run(text: str | Path, what: str) -> None:
    """As `check_folder`, for a run or checkpoint whose adapter is needed."""
    check_folder(text, what)
    if said := Run(Path(text)).without_model:
        raise InputError(f"{what}: {said}")


def check_part(text: str, what: str) -> None:
    """As `check_model`, for a vision tower too, which may be one of open_clip's."""
    if not text.startswith("open_clip:"):
        check_model(text, what)


def check_written_folder(text: str | Path, what: str) -> None:
    """As `check_written`, for a folder, which is made with those above it."""
    check_written(text, what, folder=True)


def check_kept(text: str | Path, what: str) -> None:
    """As `check_written`, for a file whose folder is made where it is missing."""
    check_written(text, what, made=True)


def check_written(text: str | Path, what: str, *, folder: bool = False, made: bool = False) -> None:
    """Raise InputError when a file or folder cannot be made where it shall be written.

    Args:
        text: The file or folder.
        what: The flag or setting, for the message.
        folder: Whether it is a folder, which is made with those above it.
        made: Whether a file's folder is made too; otherwise it has to be there.
    """
    if is_address(str(text)):
        raise InputError(f"{what}: {text} is an address; give a place on this machine.")
    place = Path(expanded(str(text)))
    if folder and place.exists() and not place.is_dir():
        raise InputError(f"{what}: {text} is a file; choose a folder.")
    if not folder and place.is_dir():
        raise InputError(f"{what}: {text} is a folder; name a file.")
    above = place if place.exists() else place.parent
    if not folder and not made and not above.exists():
        raise InputError(f"{what}: {text} cannot be written, because the folder {above} does not exist; make it first.")
    while not above.exists():
        above = above.parent
    if above.is_file() and above != place:
        raise InputError(f"{what}: {text} cannot be written, because {above} is a file; choose another place.")
    if not os.access(above, os.W_OK | (os.X_OK if above.is_dir() else 0)):
        read_only = bool(os.statvfs(above).f_flag & os.ST_RDONLY) if hasattr(os, "statvfs") else False
        reason = os.strerror(errno.EROFS if read_only else errno.EACCES)
        raise InputError(f"{what}: {text} cannot be written ({reason}); choose another place.")


def missing(modules: Iterable[str]) -> list[str]:
    """Those of some modules that are not installed; nothing is imported but the packages above them."""
    return [module for module in modules if not _is_installed(module)]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # the package above it is missing, or it was taken out of `sys.modules`
        return False


def _check_there(place: Path, what: str) -> None:
    try:
        place.stat()
    except OSError as error:
        absent = error.errno in (errno.ENOENT, errno.ENOTDIR)
        reason = "does not exist" if absent else f"cannot be read ({error.strerror})"
        near = neighbour(place) if absent else None
        advice = f"did you mean {near}?" if near else "check the path."
        raise InputError(f"{what}: {place} {reason}; {advice}") from error


Check: TypeAlias = Callable[[Any, str], None]


def looks(parser: argparse.ArgumentParser, **checks: Check) -> None:
    """Say what else looks at the values of a parser's arguments, by their `dest`; `check_arguments` does it."""
    labels = {a.dest: a.option_strings[0] if a.option_strings else str(a.metavar or a.dest) for a in parser._actions}
    known = parser.get_default("checks") or {}
    parser.set_defaults(checks=known | {labels[dest]: (dest, check) for dest, check in checks.items()})


def base_flag(parser: argparse.ArgumentParser) -> None:
    """`--base-model`, with what looks at it."""
    parser.add_argument(
        "--base-model",
        metavar="DIR",
        type=model_name,
        nargs="+",
        default=[],
        help="where the base of a run is now, if it has moved; checked by its fingerprint",
    )
    looks(parser, base_model=check_part)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Look at what the arguments of a parsed command line name. Raises InputError for the first that is wrong."""
    for label, (dest, check) in arguments.checks.items():
        value = getattr(arguments, dest)
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                check(one, label)


def carry_out(arguments: argparse.Namespace, run: Callable[[argparse.Namespace], int]) -> int:
    """Look at what a program's arguments name, and run it.

    Returns:
        The exit status. What a user can correct is one sentence on stderr, and status 1.
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
    """One sentence: an InputError's own, or one about the file that an operating system's error names."""
    if isinstance(error, InputError):
        return str(error)
    named = error.filename or "A file"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return f"{named} does not exist."
    return f"{named} cannot be written or read: {error.strerror or error}."
