"""Files of answers, as LLaVA's evaluations write them: one JSON object per line.

    {"question_id": "92", "text": "Dover is the capital of Delaware. The answer is C."}

Other keys are let stand. The id may be a number; it is read as text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qllava.config import InputError
from qllava.data.problems import Place, Problem, RowError
from qllava.data.rows import read_rows, row_id, row_text

_HEAD = b'{"question_id": '  # every line that is written here begins so


def read_answers(path: Path) -> dict[str, str]:
    """The answers of a file by their questions' ids. Raises InputError for a line that is none, or a second answer."""
    answers: dict[str, str] = {}
    for place, row in read_rows(path):
        id, text = _answer(row, place)
        if id in answers:
            raise RowError(Problem("answer twice", "this question has an answer already", "keep one", place, id))
        answers[id] = text
    if not answers:
        raise InputError(f"{path} holds no answers; give it lines with question_id and text.")
    return answers


def _answer(row: Any, place: Place) -> tuple[str, str]:
    id = row_id(row, place, "question_id")
    return id, row_text(row, "text", place, id)


def answered_before(path: Path, settings: dict[str, str]) -> dict[str, str]:
    """What an interrupted run has answered in `path` by now; a last line that it left half written is cut off.

    `settings` (model, order of the prompt) stand in every line. Raises InputError when the file is not one that these
    settings have written; it is then left as it is.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); choose another place.") from error
    end = raw.rfind(b"\n") + 1
    answers = {}
    for number, line in enumerate(raw[:end].splitlines(), start=1):
        place = Place(str(path), line=number)
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or {key: row.get(key) for key in settings} != settings:
            wanted = ", ".join(f"{key} {value}" for key, value in settings.items())
            raise InputError(f"{place}: this is no answer of this run ({wanted}); name another file for --out.")
        id, text = _answer(row, place)
        answers[id] = text
    half = raw[end:]
    if half[: len(_HEAD)] != _HEAD[: len(half)]:
        raise InputError(f"{path} holds something else than answers; name another file for --out.")
    if half:
        with path.open("r+b") as file:
            file.truncate(end)
    return answers


def append_answers(path: Path, answers: dict[str, str], settings: dict[str, str]) -> None:
    """Append answers by id, so that an interruption loses none. Raises InputError when the file cannot be written."""
    lines = [json.dumps({"question_id": id, "text": text, **settings}) + "\n" for id, text in answers.items()]
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another place.") from error
