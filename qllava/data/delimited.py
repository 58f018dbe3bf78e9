"""Tables with a header (CSV, TSV) -> records."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from qllava.data.problems import FORMATS, OnProblem, Place, Problem

_TABLE = {name: name for name in ("question", "answer", "image", "id", "type")} | dict.fromkeys(
    ("picture", "image_path", "file_name"), "image"
)


def read_csv(file: TextIO, path: Path, on_problem: OnProblem) -> Iterator[tuple[Place, Any]]:
    """The rows of a table; `file` stands at its beginning. A record that cannot be read is left out."""
    header, skipped = "", 0
    for header in file:
        skipped += 1
        if header.strip():
            break
    delimiter, columns = _header(header)
    names = [column for column in columns if column is not None]
    if not {"question", "answer"} <= set(names):
        problem = "the file is neither JSON nor a table with the columns question and answer"
        on_problem(Problem("not a data file", problem, FORMATS, Place(str(path))))
        return
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        problem = f"the header names the {twice} {names.count(twice)} times"
        on_problem(Problem("table", problem, "keep one of these columns", Place(str(path), line=skipped)))
        return
    reader = csv.reader(file, delimiter=delimiter, strict=True, skipinitialspace=True)
    while True:
        place = Place(str(path), line=skipped + reader.line_num + 1)
        try:
            record = next(reader, None)
        except csv.Error as error:
            hint = "close every quote, and double the quotes inside a quoted field"
            on_problem(Problem("table", f"the record cannot be read ({error})", hint, place))
            continue
        if record is None:
            return
        if any("\0" in field for field in record):
            on_problem(Problem("table", "the record holds a NUL character", "write it again", place))
        elif len(record) == len(columns):
            yield place, _record(columns, record)
        elif record:  # a blank line is no record
            problem = f"the number of fields is {len(record)}, of columns {len(columns)}"
            hint = f"quote fields that hold {delimiter!r} or a line break"
            on_problem(Problem("table", problem, hint, place))


def _header(line: str) -> tuple[str, list[str | None]]:
    """Delimiter of a table, and what each of its columns is for (None: nothing); no columns where it is no header."""
    for delimiter in ",;\t":
        try:
            fields = next(csv.reader([line], delimiter=delimiter, strict=True, skipinitialspace=True), [])
        except csv.Error:
            continue
        columns = [_TABLE.get(field.strip().lower()) for field in fields]
        if "question" in columns and "answer" in columns:
            return delimiter, columns
    return ",", []


def _record(columns: list[str | None], record: list[str]) -> dict[str, str]:
    # An empty cell of image, id or type says nothing; of the others, that words are missing.
    cells = [(column, field) for column, field in zip(columns, record, strict=True) if column is not None]
    row = {column: field for column, field in cells if field.strip() or column in ("question", "answer")}
    return row | {"image": row["image"].strip()} if "image" in row else row
