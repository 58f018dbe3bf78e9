"""Problems of a data file and their places: `Place`, `Problem`, and the two ways to report one.

A reader passes every problem to an `OnProblem`. `stop` raises the first error as a `RecordError`; a list's `append`
collects them all. The check for text that is not Unicode is here too, one function for all readers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from qllava.config import InputError


@dataclass(frozen=True)
class Place:
    """Place of an example in a data file."""

    file: str
    """Path of the file, as the user gave it."""
    line: int | None = None
    """Line, from 1, in which the example begins; None for a file without lines."""
    row: int | None = None
    """Number of the example, from 1; None for a file whose examples are not counted."""

    def __post_init__(self) -> None:
        # A file name that is not UTF-8 has surrogates, which can be neither stored in a table nor printed.
        object.__setattr__(self, "file", self.file.encode(errors="backslashreplace").decode())

    def __str__(self) -> str:
        name = _plain(PurePath(self.file).name)
        if self.row is not None:
            return f"{name}, example {self.row}"
        return f"{name}, line {self.line}" if self.line is not None else _plain(self.file)

    @property
    def within(self) -> str:
        """Place inside the file, as "example 3", which replaces a missing id."""
        return str(self).rpartition(", ")[2]


@dataclass(frozen=True)
class Problem:
    """A problem of a data file, in words for the user."""

    kind: str
    """A few words that all problems of one kind share."""
    problem: str
    """Description of the problem, without capital letter and full stop."""
    hint: str
    """Hint on what to do, without capital letter and full stop."""
    place: Place
    """Place of the problem."""
    id: str | None = None
    """Id of the example; None if it has none or it could not be read."""
    severity: Literal["error", "warning", "note"] = "error"
    """An `error` cannot be learned from, and ends a run before it begins. A `warning` fails a check, but not a run:
    the example is dropped or trimmed as asked, loses a turn, or measures nothing. A `note` fails neither."""

    def __post_init__(self) -> None:
        if self.id == self.place.within:  # an example without an id is named by its place
            object.__setattr__(self, "id", None)
        # File names, and messages of libraries about corrupt files, may contain any character.
        object.__setattr__(self, "problem", _plain(self.problem))

    def __str__(self) -> str:
        where = str(self.place)
        if self.id is not None:  # an id may be very long or have line breaks; the message is one sentence
            plain = len(self.id) <= 80 and self.id.isprintable()
            where += f", id {self.id if plain else repr(self.id[:80])}"
        return f"{where}: {self.problem}; {self.hint}."


def _plain(text: str) -> str:
    """Return a text as one printable line, with line breaks and control characters as escapes."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class RecordError(InputError):
    """A problem as an exception, for readers that stop at the first one."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)  # as the only argument: exceptions travel between processes by their arguments
        self.problem = problem


class Unusable(ValueError):
    """Error of a record whose place is not known yet: kind, problem and hint of a `Problem`."""

    def __init__(self, kind: str, problem: str, hint: str) -> None:
        super().__init__(kind, problem, hint)
        self.kind, self.problem, self.hint = kind, problem, hint


OnProblem = Callable[[Problem], None]


def stop(problem: Problem) -> None:
    """Raise an error as a RecordError, as the `OnProblem` of readers that stop at the first one."""
    if problem.severity == "error":
        raise RecordError(problem)


FORMATS = (
    "a data file is a JSON list of examples, one example per line, a table (CSV), Parquet, Arrow or a WebDataset tar"
)


def is_unicode(text: str) -> bool:
    """Return whether every character of a text can be written as UTF-8.

    JSON can contain half of a character (a lone surrogate, as in "\\ud800"). No tokenizer can read it, no file or
    terminal can show it, and a replacement would be learned instead of the written text. So every reader refuses it.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_unicode(text: str, what: str, kind: str = "no text") -> None:
    """Raise Unusable, of this kind, for a text that is not Unicode (`is_unicode`); `what` names its field."""
    if not is_unicode(text):
        problem = f"{what} contains half of a character (a \\u escape of a surrogate without its partner)"
        raise Unusable(kind, problem, "write the complete character")


# Errors that pyarrow and tarfile raise for corrupt bytes besides their own, when they follow wrong offsets.
DAMAGE = (OSError, ValueError, LookupError, OverflowError, MemoryError, RecursionError)


def broken(kind: str, reason: str, place: Place) -> Problem:
    """Return the problem of a binary file of which the rest cannot be read."""
    short = " ".join(reason.split())[:200].rstrip(".") or "not enough memory"  # the reason of a MemoryError is empty
    problem = f"from here on the {kind} cannot be read ({short})"
    return Problem("file broken", problem, "download it or write it again", place)
