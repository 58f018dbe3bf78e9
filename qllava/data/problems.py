"""What is wrong with a data file, and where: `Place`, `Problem`, and the two ways to report one.

A reader hands every problem to an `OnProblem`. `stop` raises the first error as a `RecordError`; a list's `append`
collects them all. Text that is not Unicode is found here too, by one function for every reader.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from qllava.config import InputError


@dataclass(frozen=True)
class Place:
    """Where an example stands.

    file: the path, as it was given.
    line: where it begins, in a file that has lines.
    row: its number, in a file whose examples are counted; both begin at 1.
    """

    file: str
    line: int | None = None
    row: int | None = None

    def __post_init__(self) -> None:
        # A file name that is not UTF-8 holds surrogates, which can be neither kept in a table nor printed.
        object.__setattr__(self, "file", self.file.encode(errors="backslashreplace").decode())

    def __str__(self) -> str:
        name = _plain(PurePath(self.file).name)
        if self.row is not None:
            return f"{name}, example {self.row}"
        return f"{name}, line {self.line}" if self.line is not None else _plain(self.file)

    @property
    def within(self) -> str:
        """The place inside its file: "example 3"; it replaces an id that an example does not have."""
        return str(self).rpartition(", ")[2]


@dataclass(frozen=True)
class Problem:
    """What is wrong, in words for the user.

    kind: a few words that all problems of one sort share.
    problem, hint: what is wrong and what to do about it; no capital letter, no full stop.
    place: where.
    id: of the example, where it could be read.
    severity: an `error` cannot be learned from, and ends a run before it begins; a `warning` fails a check, but not a
        run: the example is dropped or trimmed as asked, loses a turn, or measures nothing; a `note` fails neither.
    """

    kind: str
    problem: str
    hint: str
    place: Place
    id: str | None = None
    severity: Literal["error", "warning", "note"] = "error"

    def __post_init__(self) -> None:
        if self.id == self.place.within:  # an example without an id goes by its place
            object.__setattr__(self, "id", None)
        # File names, and the words of the libraries that read broken files, may hold anything.
        object.__setattr__(self, "problem", _plain(self.problem))

    def __str__(self) -> str:
        where = str(self.place)
        if self.id is not None:  # an id may be a whole book, or hold line breaks; this is one sentence
            plain = len(self.id) <= 80 and self.id.isprintable()
            where += f", id {self.id if plain else repr(self.id[:80])}"
        return f"{where}: {self.problem}; {self.hint}."


def _plain(text: str) -> str:
    """Text that can be printed, in one line: line breaks and control characters as escapes."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class RecordError(InputError):
    """A problem as an exception, for the readers that end at the first one."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)  # as the only argument: exceptions travel between processes by their arguments
        self.problem = problem


class Unusable(ValueError):
    """What is wrong with a record, before it is known where the record is: kind, problem and hint of a `Problem`."""

    def __init__(self, kind: str, problem: str, hint: str) -> None:
        super().__init__(kind, problem, hint)
        self.kind, self.problem, self.hint = kind, problem, hint


OnProblem = Callable[[Problem], None]


def stop(problem: Problem) -> None:
    """The `OnProblem` of readers that end at the first error: raises it as a RecordError."""
    if problem.severity == "error":
        raise RecordError(problem)


FORMATS = (
    "a data file is a JSON list of examples, one example per line, a table (CSV), Parquet, Arrow or a WebDataset tar"
)


def is_unicode(text: str) -> bool:
    """Return whether every character of a text can be written as UTF-8.

    JSON can spell half of a character (a lone surrogate, as in "\\ud800"). No tokenizer can read it, no file or
    terminal can show it, and a replacement would be learned in place of what was written. So every reader refuses it.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_unicode(text: str, what: str, kind: str = "no text") -> None:
    """Raise Unusable, of this kind, for a text that `is_unicode` refuses; `what` names its field."""
    if not is_unicode(text):
        problem = f"{what} holds half of a character (a \\u escape of a surrogate without its partner)"
        raise Unusable(kind, problem, "write the character whole")


# What pyarrow and tarfile raise for corrupt bytes besides their own errors, when they follow wrong offsets.
DAMAGE = (OSError, ValueError, LookupError, OverflowError, MemoryError, RecursionError)


def broken(kind: str, reason: str, place: Place) -> Problem:
    """Return the problem of a binary file that cannot be read any further."""
    short = " ".join(reason.split())[:200].rstrip(".") or "not enough memory"  # the reason of a MemoryError is empty
    problem = f"from here on the {kind} cannot be read ({short})"
    return Problem("file broken", problem, "download it or write it again", place)
