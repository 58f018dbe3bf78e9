"""Tables become the same examples as JSONL, and what is broken in them is reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from qllava.data.formats import read_examples
from qllava.data.problems import Place, RecordError
from tests.data.container_files import FORMATS, QUESTIONS, as_jsonl, packs_of, said, table


class TestTables:
    @pytest.mark.parametrize("delimiter", [",", ";", "\t"])
    def test_it_is_read_as_json_is(self, folder: Path, delimiter: str) -> None:
        table(folder / "t.csv", delimiter)
        assert said(read_examples(folder / "t.csv")) == as_jsonl(folder, QUESTIONS)

    @pytest.mark.parametrize("column", ["image", "picture", "image_path", "file_name"])
    def test_columns_are_known_by_any_case_and_name(self, folder: Path, column: str) -> None:
        table(folder / "t.csv", header=f'\ufeffID ,"{column.upper()}", Question,ANSWER, type')
        assert said(read_examples(folder / "t.csv")) == as_jsonl(folder, QUESTIONS)

    def test_places_are_the_lines_where_records_begin(self, folder: Path) -> None:
        (folder / "t.csv").write_bytes(b'\r\nquestion,answer,other\r\na,"b\r\nb",1\r\n\r\nc,d,2\r\n')
        assert packs_of(folder / "t.csv") == (
            [
                (Place(str(folder / "t.csv"), line=3), {"question": "a", "answer": "b\nb", "other": "1"}),
                (Place(str(folder / "t.csv"), line=6), {"question": "c", "answer": "d", "other": "2"}),
            ],
            [],
        )

    def test_space_before_a_quote_is_no_part_of_the_cell(self, folder: Path) -> None:
        (folder / "t.csv").write_text('question, answer, image\n"a, b", " c", \n')
        assert [row for _, row in packs_of(folder / "t.csv")[0]] == [{"question": "a, b", "answer": " c"}]

    @pytest.mark.parametrize(
        "text",
        ["question;answer,image\na;b,c", "hello\nworld", '"question,answer\na,b', "question|answer\na|b", "\x01"],
    )
    def test_other_text_is_refused(self, folder: Path, text: str) -> None:
        (folder / "t.csv").write_text(text)
        rows, problems = packs_of(folder / "t.csv")
        assert not rows
        assert problems == [
            f"{folder}/t.csv: the file is neither JSON nor a table with the columns question and answer; {FORMATS}."
        ]

    @pytest.mark.parametrize(
        ("text", "problem", "left"),
        [
            ("q,question,answer\n", "", 0),
            ("question,answer\na\nb,c", "line 2: the number of fields is 1, of columns 2; "
             "quote fields that hold ',' or a line break", 1),
            ("question;answer\na;b\nb;c;d\ne;f", "line 3: the number of fields is 3, of columns 2; "
             "quote fields that hold ';' or a line break", 2),
            ('question,answer\na,"b\nc"d,e\nf,g', "line 2: the record cannot be read (',' expected after '\"'); "
             "close every quote, and double the quotes inside a quoted field", 1),
            ('question,answer\na,b\nc,"d\ne,f', "line 3: the record cannot be read (unexpected end of data); "
             "close every quote, and double the quotes inside a quoted field", 1),
            (f"question,answer\na,{'x' * 140_000}\nc,d", "", 2),
            (
                f"question,answer\na,{'b' * 600}\0\nc,d",
                "line 2: the record contains a NUL character; write it again",
                1,
            ),
            ("image,question,answer,Image\n", "line 1: the header names the image 2 times; "
             "keep one of these columns", 0),
        ],
    )  # fmt: skip
    def test_what_is_broken_is_said_and_the_rest_is_read(
        self, folder: Path, text: str, problem: str, left: int
    ) -> None:
        (folder / "t.csv").write_text(text)
        rows, problems = packs_of(folder / "t.csv")
        assert problems == ([f"t.csv, {problem}."] if problem else [])
        assert len(rows) == left

    def test_a_field_beyond_any_limit_is_told_as_such(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("qllava.data.delimited._LONGEST", 5000)
        (folder / "t.csv").write_text(f"question,answer\na,{'x' * 6000}\nc,d")
        rows, problems = packs_of(folder / "t.csv")
        assert [row["question"] for _, row in rows] == ["c"]
        assert problems == [
            "t.csv, line 2: a field is longer than 5,000 characters; an unclosed quote makes one field of all "
            "text after it; close the quote, or shorten the field."
        ]

    def test_words_that_are_missing_are_an_error_of_the_row(self, folder: Path) -> None:
        (folder / "t.csv").write_text("question,answer\na,b\nc, \n")
        with pytest.raises(RecordError) as error:
            read_examples(folder / "t.csv")
        assert str(error.value) == "t.csv, line 3: turn 2 is an empty answer; write it or drop the example."
