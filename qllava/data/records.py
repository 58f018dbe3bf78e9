"""Reader of data files, record by record; problems of a file or a line become a `Problem` with its place.

The format of a file is recognized by its content, not by its name:

    text that begins with [      a JSON list of examples, read piece by piece: a file of any size costs no memory
    text that begins with {      one JSON example per line (JSONL)
    other text                   a table with a header: image, question, answer (CSV)
    Parquet, Arrow, tar          see `containers`
    a folder                     of such files: a saved Hugging Face dataset, or the shards of a WebDataset

What an example must contain is checked in `formats`.

The reader of JSON lists is ours: `ijson` streams a list too, but neither it nor the reader of `datasets` returns the
line in which an example begins, and every message about an example names its line.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from qllava.data import containers, delimited
from qllava.data.problems import OnProblem, Place, Problem, RecordError, Unusable, check_unicode, stop

_PIECE = 1 << 20  # characters that are read at a time
# Maximum length of a JSON token that the end of a piece cuts in two, except strings, which may be longer.
_CUT = 32
# Maximum number of characters of a number after the point where it seems to end: "e+" of a cut 1e+5.
_NUMBER_CUT = 2
_RECORDS_IN_A_FOLDER = {".parquet", ".arrow", ".tar", ".json"}


def record_id(record: Any, place: Place, key: str) -> str:
    """Return the id of an example, as text.

    Raises:
        InputError: The example has no id.
    """
    id = record.get(key) if isinstance(record, dict) else None
    if not isinstance(id, str | int) or isinstance(id, bool):
        raise RecordError(Problem("no id", f"the line has no {key}", f"expected an object with {key}", place))
    _check_unicode(str(id), key, place, None)
    return str(id)


def record_text(record: dict[str, Any], key: str, place: Place, id: str) -> str:
    """Return the text under a key of an example.

    Raises:
        InputError: The value is not a text.
    """
    text = record.get(key)
    if not isinstance(text, str):
        problem = f"{key!r} contains no text"
        raise RecordError(
            Problem("no text", problem, "add the text; write an empty text if there was no answer", place, id)
        )
    _check_unicode(text, key, place, id)
    return text


def _check_unicode(text: str, key: str, place: Place, id: str | None) -> None:
    try:
        check_unicode(text, f"the {key}")
    except Unusable as error:
        raise RecordError(Problem(error.kind, error.problem, error.hint, place, id)) from None


def read_records(path: Path, on_problem: OnProblem = stop) -> Iterator[tuple[Place, Any]]:
    """Yield the records of a file or folder with their places, unchecked.

    A line that cannot be read is reported to `on_problem` and left out, as is the rest of a corrupt file.
    """
    try:
        if is_folder(path):
            yield from containers.read_folder(path, on_problem)
            return
        if path.exists() and not path.is_file():  # opening a pipe would block
            problem = "this is neither a file nor a folder"
            on_problem(Problem("file unreadable", problem, "write the examples to a file", Place(str(path))))
            return
        with path.open("rb") as file:
            head = file.read(512)
        if b"\0" in head and not head.startswith((b"\xff\xfe", b"\xfe\xff")):
            yield from containers.read_container(path, head, on_problem)
            return
        with path.open(encoding="utf-8-sig") as text:
            yield from _read_text(text, path, on_problem)
    except OSError as error:
        reason = error.strerror or str(error)
        on_problem(
            Problem("file unreadable", f"the data file cannot be read ({reason})", "check its name", Place(str(path)))
        )
    except UnicodeDecodeError as error:
        problem = f"the data file is not UTF-8 text ({error.reason})"
        on_problem(Problem("not UTF-8", problem, "save it as UTF-8", Place(str(path), line=_undecodable(path))))


def record_files(path: Path) -> list[Path]:
    """Return the files with the examples of a data set: the file itself, or those in a folder, except images."""
    return sorted(p for p in path.rglob("*") if p.suffix in _RECORDS_IN_A_FOLDER) if is_folder(path) else [path]


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder; False, and no error, if that cannot be determined."""
    try:
        return path.is_dir()
    except OSError:  # a name that is too long, or a parent folder without permission
        return False


def _undecodable(path: Path) -> int:
    """Return the line of the first byte that is not UTF-8, which Python's text reader does not report."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            try:
                decoder.decode(piece)
            except UnicodeDecodeError as error:
                return line + error.object[: error.start].count(b"\n")
            line += piece.count(b"\n")
    return line


def _read_text(file: TextIO, path: Path, on_problem: OnProblem) -> Iterator[tuple[Place, Any]]:
    # Not by lines: a whole JSON list may be on one line.
    first = next((piece.lstrip() for piece in iter(lambda: file.read(512), "") if piece.strip()), "")
    file.seek(0)
    if first.startswith("["):
        yield from _JsonList(file, str(path)).records(on_problem)
    elif first.startswith("{") or not first:
        yield from _read_lines(file, str(path), on_problem)
    else:
        yield from delimited.read_csv(file, path, on_problem)


def _read_lines(file: TextIO, path: str, on_problem: OnProblem) -> Iterator[tuple[Place, Any]]:
    # Not str.splitlines: it also splits at U+2028 and others, which may be unescaped inside a JSON string.
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            yield Place(path, line=number), json.loads(line.rstrip("\n"))
        except (ValueError, RecursionError) as error:
            on_problem(_not_json(error, Place(path, line=number)))
            if line.strip() == "{":  # one problem is enough for an object that spans lines
                return


def _not_json(error: Exception, place: Place, column: int | None = None) -> Problem:
    """Return the problem of text that json cannot read: not JSON, nested too deeply, or a number with many digits."""
    if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg}, column {column or error.colno}"
    else:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]
    hint = "a data file is a JSON list of examples, or one example per line"
    return Problem("not JSON", f"this is not valid JSON ({reason})", hint, place)


class _JsonList:
    """Reader of a JSON list, element by element; `text` holds what was read from the file and not yet parsed."""

    def __init__(self, file: TextIO, path: str) -> None:
        self.file, self.path = file, path
        self.text = ""
        self.position = 0
        self.line = 1
        self.line_start = 0  # start of the line, relative to `text`; negative if the line began before it
        self.ended = False
        self.decoder = json.JSONDecoder()

    def records(self, on_problem: OnProblem) -> Iterator[tuple[Place, Any]]:
        """Yield the elements with their places; text that is not JSON is reported and ends the list."""
        try:
            self._expect("[")
            number = 0
            if self._peek() == "]":
                self._advance(self.position + 1)
            else:
                while True:
                    self._peek()
                    number += 1
                    place = Place(self.path, line=self.line, row=number)
                    yield place, self._value()
                    if self._expect(",]") == "]":
                        break
            if self._peek():
                raise json.JSONDecodeError("Extra data", self.text, self.position)
        except (ValueError, RecursionError) as error:
            at = error.pos if isinstance(error, json.JSONDecodeError) else self.position
            self._advance(at)
            column = self.position - self.line_start + 1
            on_problem(_not_json(error, Place(self.path, line=self.line), column))

    def _more(self) -> None:
        """Read more text, doubling what is there, so that a large element is not parsed again too often."""
        piece = self.file.read(max(_PIECE, len(self.text) - self.position))
        self.ended = not piece
        self.line_start -= self.position
        self.text = self.text[self.position :] + piece
        self.position = 0

    def _advance(self, to: int) -> None:
        """Move the position to `to`, and count the lines before it."""
        lines = self.text.count("\n", self.position, to)
        if lines:
            self.line += lines
            self.line_start = self.text.rfind("\n", self.position, to) + 1
        self.position = to

    def _peek(self) -> str:
        """Return the next character other than white space; "" at the end."""
        while True:
            at = self.position
            while at < len(self.text) and self.text[at] in " \t\n\r":
                at += 1
            self._advance(at)
            if at < len(self.text) or self.ended:
                return self.text[at : at + 1]
            self._more()

    def _expect(self, characters: str) -> str:
        found = self._peek()
        if not found or found not in characters:
            wanted = " or ".join(repr(c) for c in characters)
            raise json.JSONDecodeError(f"Expecting {wanted}", self.text, self.position)
        self._advance(self.position + 1)
        return found

    def _value(self) -> Any:
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - _CUT
                if self.ended or not cut:
                    raise
            else:
                if end < len(self.text) - _NUMBER_CUT or self.ended:
                    self._advance(end)
                    return value
            self._more()
