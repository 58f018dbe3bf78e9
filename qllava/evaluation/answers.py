"""Files of answers, as LLaVA's evaluations write them: one JSON object per line.

    {"question_id": "92", "text": "Dover is the capital of Delaware. The answer is C."}

Other keys are ignored. The id may be a number; it is read as text.

Each line that qllava writes also identifies model and question: `model` is a readable name, `fingerprint` identifies
the model (`inference.identity`), and `asked` is a hash of the prompt with its image. An interrupted run is resumed only
if the fingerprint, the settings and the hashes agree; a file without fingerprints is from an older qllava, which
identified a model by its path.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qllava.config import InputError
from qllava.data.problems import Place, Problem, RecordError
from qllava.data.records import read_records, record_id, record_text
from qllava.files import ForeignEndError, Journal

_HEAD = b'{"question_id": '  # start of every line that qllava writes


def read_answers(path: Path) -> dict[str, str]:
    """Return the answers of a file by question id.

    Raises:
        InputError: A line is not an answer, a question has two answers, or the file has no answers.
    """
    answers: dict[str, str] = {}
    for place, record in read_records(path):
        id, text = _answer(record, place)
        if id in answers:
            raise RecordError(
                Problem("answer twice", "an earlier line already answers this question", "keep one", place, id)
            )
        answers[id] = text
    if not answers:
        raise InputError(f"{path} has no answers. Write lines with question_id and text.")
    return answers


def _answer(record: Any, place: Place) -> tuple[str, str]:
    id = record_id(record, place, "question_id")
    return id, record_text(record, "text", place, id)


def answered_before(path: Path, settings: Mapping[str, Any], asked: Mapping[str, str]) -> dict[str, str]:
    """Return the answers that an interrupted run has written to `path`; remove a last line that is truncated.

    Args:
        path: File of answers; it need not exist.
        settings: Settings in every line, the `fingerprint` included; `model` is only a name and may differ.
        asked: Hashes of the prompts, by question id.

    Raises:
        InputError: A line is from another model, other settings or another question; the file is not changed.
    """
    try:
        with Journal(path, begins=_HEAD, new=False) as journal:
            answers = dict(_checked(path, journal, settings, asked))
            journal.mend()
            return answers
    except FileNotFoundError:
        return {}
    except ForeignEndError as error:
        raise InputError(f"{path} is not a file of answers; give another file for --out.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); choose another path.") from error


def _checked(
    path: Path, journal: Journal, settings: Mapping[str, Any], asked: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(journal.lines(), start=1):
        place = Place(str(path), line=number)
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise InputError(f"{place}: this line is not an answer; give another file for --out.")
        if other := _other(record, settings, asked):
            raise InputError(f"{place}: {other}; give another file for --out.")
        yield _answer(record, place)


def _other(record: Mapping[str, Any], settings: Mapping[str, Any], asked: Mapping[str, str]) -> str:
    """Return the reason why a line was not written with these settings; empty if it was."""
    if "fingerprint" not in record:
        return "the answer does not say which model gave it (an older qllava identified a model by its path)"
    for name, value in settings.items():
        if name == "model" or record.get(name) == value:
            continue
        if name == "fingerprint":
            return (
                f"another model gave this answer (fingerprint {record[name]}, called {record.get('model')}; "
                f"now {value}, called {settings.get('model')})"
            )
        return f"the answer was given with {name} {record.get(name)}, and this run has {name} {value}"
    if record.get("asked") != asked.get(str(record.get("question_id"))):
        return f"question {record.get('question_id')} had another text or another image when it was answered"
    return ""


def append_answers(
    path: Path, answers: Mapping[str, str], settings: Mapping[str, Any], asked: Mapping[str, str]
) -> None:
    """Append answers, so that an interruption loses none.

    Args:
        path: File of answers.
        answers: Answers by question id.
        settings: Settings to write in every line.
        asked: Hashes of the prompts, by question id.

    Raises:
        InputError: The file cannot be written.
    """
    lines = [
        json.dumps({"question_id": id, "text": text, **settings, "asked": asked[id]}) + "\n"
        for id, text in answers.items()
    ]
    try:
        with Journal(path, begins=_HEAD) as journal:
            journal.append("".join(lines).encode())
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another path.") from error
