"""Files are read piece by piece: wherever a piece ends, the examples, their places and what is broken are the same."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qllava.config import InputError
from qllava.data import records as module
from qllava.data.problems import Place, Problem, RecordError, stop
from qllava.data.records import is_folder, read_records

ODD = [
    {"id": 1, "text": 'a "quoted" \\ text\n\ttab', "number": -1.5e-7, "none": None},
    {"id": "é\u2028\U0001f600", "deep": [[], {}, [[1, [2, [3]]]]], "true": True},
    {},
    {"long": "word " * 40, "escaped": "\U0001f600 ü"},
]
TEXTS = {
    "a list on one line": json.dumps(ODD),
    "a list as people write it": json.dumps(ODD, indent=2, ensure_ascii=False),
    "Windows lines and a byte order mark": "\ufeff" + json.dumps(ODD, indent=1).replace("\n", "\r\n"),
    "white space everywhere": "\n\n [\t" + " ,\n\n ".join(map(json.dumps, ODD)) + "\n]\n\n",
    "elements that are no examples": '[1, 2.5, -1.5e+10 , "a", true, null, [], 12345678901234567890, NaN, -Infinity]',
}
BROKEN = {
    "cut off in a string": json.dumps(ODD)[:30],
    "cut off in a number": '[{"a": 1.5e',
    "cut off between examples": '[{"a": 1},\n',
    "no comma": '[{"a": 1}\n{"b": 2}]',
    "a word": '[{"a": 1}, nul]',
    "more behind the end": '[{"a": 1}]\n]',
    "a control character": '[{"a": "1\x01"}]',
}


def found(path: Path) -> tuple[list[tuple[Place, Any]], list[str]]:
    problems: list[str] = []
    return list(read_records(path, lambda problem: problems.append(str(problem)))), problems


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.json"


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("ending", ["", "\n"])
def test_a_list_is_the_same_wherever_a_piece_ends(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str, ending: str
) -> None:
    text = TEXTS[name] + ending
    path.write_text(text, encoding="utf-8", newline="")
    whole = found(path)
    assert [repr(row) for _, row in whole[0]] == [repr(row) for row in json.loads(text.lstrip("\ufeff"))]
    assert whole[1] == []
    for size in range(1, 41):
        monkeypatch.setattr(module, "_PIECE", size)
        assert repr(found(path)) == repr(whole)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_the_same_wherever_a_piece_ends(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path.write_text(BROKEN[name], encoding="utf-8")
    whole = found(path)
    assert len(whole[1]) == 1
    for size in range(1, 41):
        monkeypatch.setattr(module, "_PIECE", size)
        assert found(path) == whole


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=4), JSON, max_size=4), max_size=4),
    size=st.integers(1, 60),
    indent=st.none() | st.integers(0, 3),
    ascii=st.booleans(),
)
def test_any_list_is_what_json_reads(path: Path, rows: list[Any], size: int, indent: int | None, ascii: bool) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii)
    path.write_bytes(text.encode("utf-8", "replace"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE", size)
        read, problems = found(path)
    assert [row for _, row in read] == json.loads(path.read_bytes())
    assert problems == []
    at = [place.line for place, _ in read]
    assert all(line is not None and text.split("\n")[line - 1].strip() for line in at)


def test_places_are_lines_and_rows(path: Path) -> None:
    path.write_text('[{"a": 1},\n\n {"b":\n 2}, {"c": 3}]')
    assert [place for place, _ in found(path)[0]] == [
        Place(str(path), line=1, row=1),
        Place(str(path), line=3, row=2),
        Place(str(path), line=4, row=3),
    ]
    path.write_text('\n{"a": 1}\n\n{"b": 2}')
    assert [place for place, _ in found(path)[0]] == [Place(str(path), line=2), Place(str(path), line=4)]


def test_places_and_problems_are_said_in_one_line() -> None:
    assert str(Place("folder/rows.json", line=3, row=2)) == "rows.json, example 2"
    assert str(Place("folder/rows.jsonl", line=3)) == "rows.jsonl, line 3"
    assert str(Place("folder/rows.json")) == "folder/rows.json"
    assert (Place("r", line=3, row=2).within, Place("r", line=3).within) == ("example 2", "line 3")

    def said(id: str | None) -> str:
        return str(Problem("kind", "the image is missing", "add it", Place("r.json", row=2), id))

    assert said(None) == "r.json, example 2: the image is missing; add it."
    assert said("é 7") == "r.json, example 2, id é 7: the image is missing; add it."
    assert said("a\nb") == "r.json, example 2, id 'a\\nb': the image is missing; add it."
    assert said("9" * 4000) == f"r.json, example 2, id '{'9' * 80}': the image is missing; add it."


def test_a_file_name_that_is_no_utf8_can_be_said() -> None:
    assert str(Place("tr\udce4in.json")) == "tr\\udce4in.json"


def test_a_problem_is_one_line_whatever_a_library_says() -> None:
    problem = Problem("kind", "it cannot be read (a\nb\x00\u2028\ud800 é)", "write it again", Place("a\nb.json", row=2))
    assert str(problem) == "a\\nb.json, example 2: it cannot be read (a\\nb\\x00\\u2028\\ud800 é); write it again."


def test_a_row_without_an_id_is_named_by_its_place_once() -> None:
    problem = Problem("kind", "it is too long", "cut it", Place("r.json", line=9, row=2), "example 2")
    assert (problem.id, str(problem)) == (None, "r.json, example 2: it is too long; cut it.")


def test_only_errors_stop_a_reader() -> None:
    for severity in ("note", "warning"):
        stop(Problem("kind", "a", "b", Place("r"), severity=severity))  # type: ignore[arg-type]
    with pytest.raises(RecordError, match=r"^r: a; b\.$") as error:
        stop(Problem("kind", "a", "b", Place("r")))
    assert isinstance(error.value, InputError)
    copy = pickle.loads(pickle.dumps(error.value))
    assert (str(copy), copy.problem) == (str(error.value), error.value.problem)


def test_a_file_without_line_breaks_is_not_held_as_a_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 1 << 14)
    path.write_text(json.dumps([{"id": n, "text": "word " * 40} for n in range(20_000)]))
    tracemalloc.start()
    assert sum(1 for _ in read_records(path)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20 < path.stat().st_size / 4


@pytest.mark.parametrize("line", [1, 2, 57])
@pytest.mark.parametrize("bytes_", [b"\xff", b"\xc3(", b"\xe2\x82\n", b"\xed\xa0\x80"])
def test_the_line_that_is_no_utf8_is_named(
    path: Path, monkeypatch: pytest.MonkeyPatch, line: int, bytes_: bytes
) -> None:
    lines = [json.dumps({"id": n, "text": "é€"}, ensure_ascii=False).encode() for n in range(80)]
    lines[line - 1] = b'{"id": "' + bytes_ + b'"}'
    path.write_bytes(b"\n".join(lines))
    for size in (1, 7, 1000, 1 << 20):
        monkeypatch.setattr(module, "_PIECE", size)
        problems: list[Problem] = []
        read = list(read_records(path, problems.append))
        assert [problem.place for problem in problems] == [Place(str(path), line=line)]
        assert [row["id"] for _, row in read] == list(range(len(read))) and len(read) < line


def test_a_byte_order_mark_is_no_part_of_the_first_row(path: Path) -> None:
    for text in ('\ufeff{"a": 1}', '\ufeff \n[{"a": 1}]'):
        path.write_text(text, encoding="utf-8")
        assert [row for _, row in found(path)[0]] == [{"a": 1}]


def test_a_folder_that_cannot_be_seen_is_none(tmp_path: Path) -> None:
    assert is_folder(tmp_path)
    assert not is_folder(tmp_path / "gone")
    assert not is_folder(tmp_path / ("n" * 300))


def test_one_object_over_many_lines_is_one_problem(path: Path) -> None:
    path.write_text(json.dumps({"data": ODD}, indent=2))
    rows, problems = found(path)
    assert not rows and len(problems) == 1
    assert "line 1: this is not valid JSON" in problems[0]


def test_what_a_reader_of_the_first_error_sees(path: Path) -> None:
    path.write_text('{"a": 1}\n{"b"}\n')
    reader = read_records(path)
    assert next(reader)[1] == {"a": 1}
    with pytest.raises(RecordError, match=r"rows\.json, line 2: this is not valid JSON \(Expecting ':' delimiter"):
        next(reader)


def test_white_space_before_the_first_row_may_be_long(path: Path) -> None:
    for text, row in (('[{"a": 1}]', {"a": 1}), ('{"a": 1}', {"a": 1})):
        path.write_text(" \n" * 3000 + text)
        assert [(place.line, row) for place, row in found(path)[0]] == [(3001, row)]
