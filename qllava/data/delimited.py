"""Reader of tables with a header (CSV, TSV) as records, whose keys are the names of the columns."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from qllava.data.keys import SPELLINGS, can_be_records, keys_of
from qllava.data.problems import FORMATS, OnProblem, Place, Problem

_LONGEST = 1 << 26
"""Maximum number of characters in a field. Python's own limit (131,072) is less than a small image as a data URL;
without any limit, an unclosed quote would read the whole file into memory."""
_WORDS = {*SPELLINGS["question"], *SPELLINGS["answer"], *SPELLINGS["caption"]}
_QUOTES = "close every quote, and double the quotes inside a quoted field"


def read_csv(file: TextIO, path: Path, on_problem: OnProblem) -> Iterator[tuple[Place, Any]]:
    """Yield the records of a table from the beginning of `file`; a record that cannot be read is left out."""
    header, skipped = "", 0
    for header in file:
        skipped += 1
        if header.strip():
            break
    delimiter, columns = _header(header)
    if not columns:
        problem = "the file is neither JSON nor a table with the columns question and answer"
        on_problem(Problem("not a data file", problem, FORMATS, Place(str(path))))
        return
    name, times = Counter(column.lower() for column in columns).most_common(1)[0]
    if times > 1 and name:
        problem = f"the header names the {name} {times} times"
        on_problem(Problem("table", problem, "keep one of these columns", Place(str(path), line=skipped)))
        return
    reader = csv.reader(file, delimiter=delimiter, strict=True, skipinitialspace=True)
    while True:
        place = Place(str(path), line=skipped + reader.line_num + 1)
        csv.field_size_limit(_LONGEST)  # of the whole process: another reader may have set it meanwhile
        try:
            record = next(reader, None)
        except csv.Error as error:
            on_problem(_unreadable(error, place))
            continue
        if record is None:
            return
        if any("\0" in field for field in record):
            on_problem(Problem("table", "the record contains a NUL character", "write it again", place))
        elif len(record) == len(columns):
            yield place, _record(columns, record)
        elif record:  # a blank line is not a record
            problem = f"the number of fields is {len(record)}, of columns {len(columns)}"
            hint = f"quote fields that hold {delimiter!r} or a line break"
            on_problem(Problem("table", problem, hint, place))


def _unreadable(error: csv.Error, place: Place) -> Problem:
    if "field limit" in str(error):
        problem = f"a field is longer than {_LONGEST:,} characters"
        hint = "an unclosed quote makes one field of all text after it; close the quote, or shorten the field"
        return Problem("table", problem, hint, place)
    return Problem("table", f"the record cannot be read ({error})", _QUOTES, place)


def _header(line: str) -> tuple[str, list[str]]:
    """Return delimiter and columns of a table; no columns if the line is not a header."""
    for delimiter in ",;\t":
        try:
            fields = next(csv.reader([line], delimiter=delimiter, strict=True, skipinitialspace=True), [])
        except csv.Error:
            continue
        columns = [field.strip() for field in fields]
        meanings = keys_of(dict.fromkeys(columns)).spelled
        if can_be_records(columns) and ("question" not in meanings or "answer" in meanings):
            return delimiter, columns
    return ",", []


def _record(columns: list[str], record: list[str]) -> dict[str, str]:
    # An empty cell is dropped, except in a column of text, where the check must report that the text is missing.
    cells = ((column, column.lower(), field) for column, field in zip(columns, record, strict=True))
    return {
        column: field.strip() if name in SPELLINGS["image"] else field
        for column, name, field in cells
        if field.strip() or name in _WORDS
    }
