"""Tables, Parquet, Arrow and tar become the same examples as JSONL; what is broken is said; rows convert both ways."""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import tarfile
import threading
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from qllava.config import InputError
from qllava.conversation import IMAGE_TOKEN, Conversation, Turn
from qllava.data.convert import llava_row, messages_row
from qllava.data.formats import Example, Pictures, read_examples, to_example
from qllava.data.problems import Place, RowError
from qllava.data.rows import read_rows
from qllava.data.unpacked import unpack

FORMATS = "a data file is a JSON list of rows, one row per line, a table (CSV), Parquet, Arrow or a WebDataset tar"
AGAIN = "download it or write it again."
DAMAGED = "a header is damaged or cut off, or another tar was appended"


def png(color: str) -> bytes:
    file = io.BytesIO()
    Pillow.new("RGB", (4, 4), color).save(file, "PNG")
    return file.getvalue()


RED, BLUE = png("red"), png("blue")


def turns(*said: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": words} for i, words in enumerate(said)]


ROWS: list[dict[str, Any]] = [
    {"id": "one", "image": "red.png", "conversations": turns("<image>\nWhat?", "Rot, „rouge“."), "type": "color"},
    {"id": "none", "conversations": turns("Hello, you;\n\tsaid he", 'He said "ho".', "And?", "No.")},
    {"id": "two", "image": ["blue.png", "red.png"], "conversations": turns("Is <image> like <image>?", "No.")},
    {
        "id": "late",
        "image": "blue.png",
        "conversations": [{"from": "system", "value": "Be kind."}, *turns("Hi", "Yes?", "<image>\nThis?", "Blue.")],
    },
]
QUESTIONS: list[dict[str, Any]] = [
    {"id": "q1", "image": "red.png", "question": "What, pray; is it?", "answer": 'A "red"\nthing', "type": "color"},
    {"id": "q2", "question": "Tab\there?", "answer": "Yes, two\n\nlines"},
    {"id": "q3", "image": "blue.png", "question": "And this?", "answer": "Blue"},
]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLLAVA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "red.png").write_bytes(RED)
    (folder / "blue.png").write_bytes(BLUE)
    return folder


def said(examples: list[Example]) -> list[Any]:
    """All that is learned: the pictures by their bytes, and no places."""
    return [(e.id, [p.read_bytes() for p in e.images], e.conversation, e.type, e.lost) for e in examples]


def as_jsonl(folder: Path, rows: list[dict[str, Any]]) -> list[Any]:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    try:
        return said(read_examples(path))
    finally:
        path.unlink()


def rows_of(path: Path) -> tuple[list[tuple[Place, Any]], list[str]]:
    """The rows, and the problems as the user reads them."""
    problems: list[str] = []
    return list(read_rows(path, lambda problem: problems.append(str(problem)))), problems


def table(path: Path, delimiter: str = ",", header: str = "id,image,question,answer,type") -> None:
    def quoted(value: str) -> str:
        return '"' + value.replace('"', '""') + '"' if re.search('[",;\t\n]', value) else value

    keys = ("id", "image", "question", "answer", "type")
    lines = [header.replace(",", delimiter)]
    lines += [delimiter.join(quoted(row.get(key, "")) for key in keys) for row in QUESTIONS]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def embedded(row: dict[str, Any], *, listed: bool = False) -> dict[str, Any]:
    """A row whose pictures are Hugging Face's Image structs."""
    names = row.get("image", [])
    structs = [
        {"bytes": {"red.png": RED, "blue.png": BLUE}[name], "path": name}
        for name in ([names] if isinstance(names, str) else names)
    ]
    pictures = {"images": structs} if listed else {"image": structs[0] if structs else None}
    return {key: value for key, value in row.items() if key != "image"} | pictures


def add(tar: tarfile.TarFile, name: str, data: bytes | Any) -> None:
    member = tarfile.TarInfo(name)
    content = data if isinstance(data, bytes) else json.dumps(data).encode()
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_tar(path: Path, *members: tuple[str, Any]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            add(tar, name, data)
    return path


def write_columns(path: Path, rows: list[dict[str, Any]], kind: str) -> Path:
    content = pa.Table.from_pylist(rows)
    if kind == "parquet":
        pq.write_table(content, path, row_group_size=2)
    else:
        new = pa.ipc.new_file if kind == "arrow file" else pa.ipc.new_stream
        with new(str(path), content.schema) as writer:
            writer.write_table(content, max_chunksize=2)
    return path


KINDS = ["parquet", "arrow file", "arrow stream"]


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
        assert rows_of(folder / "t.csv") == (
            [
                (Place(str(folder / "t.csv"), line=3), {"question": "a", "answer": "b\nb", "other": "1"}),
                (Place(str(folder / "t.csv"), line=6), {"question": "c", "answer": "d", "other": "2"}),
            ],
            [],
        )

    def test_space_before_a_quote_is_no_part_of_the_cell(self, folder: Path) -> None:
        (folder / "t.csv").write_text('question, answer, image\n"a, b", " c", \n')
        assert [row for _, row in rows_of(folder / "t.csv")[0]] == [{"question": "a, b", "answer": " c"}]

    @pytest.mark.parametrize(
        "text",
        ["question;answer,image\na;b,c", "hello\nworld", '"question,answer\na,b', "question|answer\na|b", "\x01"],
    )
    def test_other_text_is_refused(self, folder: Path, text: str) -> None:
        (folder / "t.csv").write_text(text)
        rows, problems = rows_of(folder / "t.csv")
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
            (f"question,answer\na,{'b' * 600}\0\nc,d", "line 2: the record holds a NUL character; write it again", 1),
            ("image,question,answer,Image\n", "line 1: the header names the image 2 times; "
             "keep one of these columns", 0),
        ],
    )  # fmt: skip
    def test_what_is_broken_is_said_and_the_rest_is_read(
        self, folder: Path, text: str, problem: str, left: int
    ) -> None:
        (folder / "t.csv").write_text(text)
        rows, problems = rows_of(folder / "t.csv")
        assert problems == ([f"t.csv, {problem}."] if problem else [])
        assert len(rows) == left

    def test_a_field_beyond_any_limit_is_told_as_such(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("qllava.data.delimited._LONGEST", 5000)
        (folder / "t.csv").write_text(f"question,answer\na,{'x' * 6000}\nc,d")
        rows, problems = rows_of(folder / "t.csv")
        assert [row["question"] for _, row in rows] == ["c"]
        assert problems == [
            "t.csv, line 2: a field is longer than 5,000 characters; a quote that is not closed takes everything "
            "behind it for one field; close it, or shorten the field."
        ]

    def test_words_that_are_missing_are_an_error_of_the_row(self, folder: Path) -> None:
        (folder / "t.csv").write_text("question,answer\na,b\nc, \n")
        with pytest.raises(RowError) as error:
            read_examples(folder / "t.csv")
        assert str(error.value) == "t.csv, line 3: turn 2 is an empty answer; write it or drop the row."


class TestColumns:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("rows", [ROWS[:2] + ROWS[3:], QUESTIONS], ids=["llava", "question"])
    def test_names_of_pictures(self, folder: Path, kind: str, rows: list[dict[str, Any]]) -> None:
        path = write_columns(folder / "t.any", rows, kind)
        assert said(read_examples(path)) == as_jsonl(folder, rows)

    @pytest.mark.parametrize("kind", KINDS)
    def test_embedded_pictures(self, folder: Path, kind: str) -> None:
        path = write_columns(folder / "t.any", [embedded(row, listed=True) for row in ROWS], kind)
        assert said(read_examples(path)) == as_jsonl(folder, ROWS)
        path = write_columns(folder / "t.any", [embedded(row) for row in QUESTIONS], kind)
        assert said(read_examples(path)) == as_jsonl(folder, QUESTIONS)

    def test_bare_bytes_and_structs_that_only_name_a_file(self, folder: Path) -> None:
        asked = {"question": "What?", "answer": "This."}
        path = write_columns(folder / "bytes", [asked | {"image": RED}], "parquet")
        assert [p.read_bytes() for p in read_examples(path)[0].images] == [RED]
        path = write_columns(folder / "path", [asked | {"image": {"bytes": None, "path": "red.png"}}], "parquet")
        assert read_examples(path)[0].images == (folder / "red.png",)
        other = pa.Table.from_pylist([asked | {"image": {"url": "x"}}])
        pq.write_table(other, folder / "other")
        with pytest.raises(RowError, match="the picture must be a file name or a list of file names"):
            read_examples(folder / "other")

    @pytest.mark.parametrize("kind", KINDS)
    def test_messages_with_parts(self, folder: Path, kind: str) -> None:
        """One part with a text gives every part one, and every turn that is a part's sister."""
        answer = [{"type": "text", "text": "A thing."}]
        asked = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
        row = {
            "id": "m",
            "images": ["red.png"],
            "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}],
        }
        path = write_columns(folder / "t.any", [row], kind)
        assert rows_of(path)[0][0][1] == row
        assert said(read_examples(path)) == as_jsonl(folder, [row])

    def test_conversations_as_json_text(self, folder: Path) -> None:
        rows = [row | {"conversations": json.dumps(row["conversations"])} for row in ROWS[:2]]
        rows.append({"id": "bad", "conversations": "[{'from': 'human'}]"})
        rows.append({"id": "words", "conversations": "none"})
        found, problems = rows_of(write_columns(folder / "t.parquet", rows, "parquet"))
        pictures = Pictures(folder)
        assert said([to_example(row, place, pictures) for place, row in found[:2]]) == as_jsonl(folder, ROWS[:2])
        assert not problems
        bad = "t.parquet, row 3, id bad: the text under conversations begins with [ and is not valid JSON; write it"
        with pytest.raises(RowError, match=re.escape(bad)):
            to_example(found[2][1], found[2][0], pictures)
        with pytest.raises(RowError, match="conversations must be a list of turns, not a text"):
            to_example(found[3][1], found[3][0], pictures)

    @pytest.mark.parametrize("kind", KINDS)
    def test_rows_are_counted_and_of_other_columns_only_their_names_are_read(self, folder: Path, kind: str) -> None:
        rows = [{"question": str(i), "answer": "yes", "vector": [0.5] * 3} for i in range(150)]
        path = write_columns(folder / "t.any", rows, kind)
        found, problems = rows_of(path)
        assert not problems
        assert [place for place, _ in found] == [Place(str(path), row=i) for i in range(1, 151)]
        assert [row for _, row in found] == [{"question": str(i), "answer": "yes", "vector": True} for i in range(150)]

    @pytest.mark.parametrize("kind", KINDS)
    def test_other_columns_are_refused_at_once(self, folder: Path, kind: str) -> None:
        path = write_columns(folder / "t.any", [{"text": "a", "answer": "b"}] * 3, kind)
        assert rows_of(path) == (
            [],
            [
                f"{path}: the table has none of the columns conversations, messages, question; "
                "see the formats in docs/data.md."
            ],
        )

    @pytest.mark.parametrize(
        ("kind", "said"), zip(KINDS, ["Parquet file", "Arrow file", "Arrow stream"], strict=True)
    )  # fmt: skip
    def test_a_file_that_is_cut_off(self, folder: Path, kind: str, said: str) -> None:
        """Wherever it is cut; Arrow and Parquet words for it are in the brackets."""
        rows = [{"question": f"{i}?", "answer": "yes"} for i in range(6)]
        path = write_columns(folder / "t.any", rows, kind)
        whole = path.read_bytes()
        for length in range(520, len(whole), 41):
            path.write_bytes(whole[:length])
            found, problems = rows_of(path)
            place = f"t.any, row {len(found) + 1}"
            assert len(problems) == 1
            assert problems[0].startswith(f"{place}: from here on the {said} cannot be read (")
            assert problems[0].endswith(f"); {AGAIN}")

    def test_a_stream_without_its_end_mark(self, folder: Path) -> None:
        path = write_columns(folder / "t.any", [{"question": "a", "answer": "b"}] * 4, "arrow stream")
        path.write_bytes(path.read_bytes()[:-8])
        rows, problems = rows_of(path)
        assert len(rows) == 4
        assert problems == [
            f"t.any, row 5: from here on the Arrow stream cannot be read (it ends without its end mark); {AGAIN}"
        ]

    def test_checksums_of_pages_are_looked_at(self, folder: Path) -> None:
        rows = pa.table({"question": ["What is it?"], "answer": ["A red bus."]})
        path = folder / "t.parquet"
        pq.write_table(
            rows, path, compression="none", use_dictionary=False, write_statistics=False, write_page_checksum=True
        )
        path.write_bytes(path.read_bytes().replace(b"A red bus.", b"A red bug."))
        found, problems = rows_of(path)
        assert not found
        assert len(problems) == 1
        assert problems[0].startswith("t.parquet, row 1: from here on the Parquet file cannot be read (")

    def test_a_row_group_is_not_held_as_a_whole(self, folder: Path) -> None:
        dice = random.Random(7)
        rows = [{"question": "What?", "answer": dice.randbytes(5000).hex()} for _ in range(2000)]
        pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet", use_dictionary=False, write_batch_size=50)
        before = pa.total_allocated_bytes()
        held = [pa.total_allocated_bytes() - before for _ in read_rows(folder / "t.parquet")]
        assert len(held) == 2000
        assert max(held) < 8 << 20 < (folder / "t.parquet").stat().st_size

    def test_text_that_is_no_utf8(self, folder: Path) -> None:
        question = pa.array([b"a", b"\xff"], pa.binary()).view(pa.string())
        pq.write_table(pa.table({"question": question, "answer": ["a", "b"]}), folder / "t.parquet")
        _, problems = rows_of(folder / "t.parquet")
        assert len(problems) == 1
        assert problems[0].startswith("t.parquet, row 1: from here on the Parquet file cannot be read (")


class TestTar:
    def test_it_is_read_as_json_is(self, folder: Path) -> None:
        one, none, two, late = ({k: v for k, v in row.items() if k != "id"} for row in ROWS)
        path = write_tar(
            folder / "t.tar",
            ("one.json", one), ("one.png", RED), ("README.md", b"x"), ("._one.png", b"x"),
            ("none.json", none),
            ("two.1.PNG", RED), ("two.json", two), ("two.0.png", BLUE), ("two.cls", b"7"),
            ("late.png", BLUE), ("late.json", late | {"id": None}),
        )  # fmt: skip
        assert said(read_examples(path)) == as_jsonl(folder, ROWS)

    def test_captions(self, folder: Path) -> None:
        path = write_tar(
            folder / "t.tar",
            ("./a/1.jpg", RED), ("./a/1.txt", "\ufeffEin rötliches Bild.\n".encode()),
            ("./b/1.txt", b"Two."), ("./b/1.left.png", BLUE), ("./b/1.10.png", RED),
            ("c.json", {"width": 4, "id": 7}), ("c.txt", b"More."), ("c.png", RED),
        )  # fmt: skip
        assert said(read_examples(path)) == [
            (id, pictures, Conversation((Turn("user", asked), Turn("assistant", caption))), None, False)
            for id, pictures, asked, caption in [
                ("a/1", [RED], "<image>", "Ein rötliches Bild."),
                ("b/1", [BLUE, RED], "<image>\n<image>", "Two."),
                ("7", [RED], "<image>", "More."),
            ]
        ]

    def test_pictures_with_numbers_stand_in_their_order(self, folder: Path) -> None:
        row = {"conversations": turns("<image>" * 12, "Yes.")}
        members = [(f"s.{i}.png", png(f"#0000{i:02x}")) for i in range(12)]
        path = write_tar(folder / "t.tar", ("s.json", row), *sorted(members))
        assert [p.read_bytes() for p in read_examples(path)[0].images] == [data for _, data in members]

    def test_a_row_without_pictures_in_the_tar_names_files_of_the_folder(self, folder: Path) -> None:
        path = write_tar(folder / "t.tar", ("one.json", ROWS[0]))
        assert read_examples(path)[0].images == (folder / "red.png",)

    def test_names_that_leave_the_folder_are_harmless(self, folder: Path, tmp_path: Path) -> None:
        row = {"conversations": turns("<image>\nWhat?", "This.")}
        path = write_tar(folder / "t.tar", ("../../evil/x.json", row), ("../../evil/x.png", RED), ("/x.json", row))
        rows, problems = rows_of(path)
        assert not problems
        assert [row["id"] for _, row in rows] == ["../../evil/x", "/x"]
        assert rows[0][1]["images"][0].is_relative_to(tmp_path / "cache" / "pictures")

    @pytest.mark.parametrize("type", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.GNUTYPE_SPARSE])
    def test_links_are_not_followed(self, folder: Path, type: bytes) -> None:
        """Nor does a question lose its picture because it is one; a sparse file may claim any size."""
        with tarfile.open(folder / "t.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            add(tar, "x.json", QUESTIONS[1])
            link = tarfile.TarInfo("x.png")
            link.type, link.linkname = type, "x.json"
            tar.addfile(link)
            add(tar, "y.json", QUESTIONS[1])
            inner = tarfile.TarInfo("y.png")  # a folder is no picture, whatever its name
            inner.type = tarfile.DIRTYPE
            tar.addfile(inner)
        rows, problems = rows_of(folder / "t.tar")
        assert problems == ["t.tar, row 1, id x: the sample holds a link, or a sparse file; pack the file itself."]
        assert [str(place) for place, _ in rows] == ["t.tar, row 2"]

    @pytest.mark.parametrize(
        ("type", "size", "reason"),
        [(tarfile.REGTYPE, -512, r"a member has a negative size"), (tarfile.GNUTYPE_LONGNAME, 1 << 62, r".+")],
    )
    def test_sizes_that_lead_backwards_or_nowhere(self, folder: Path, type: bytes, size: int, reason: str) -> None:
        """Such a size is written as a binary number; backwards, the same header would be read for ever."""
        header = bytearray(tarfile.TarInfo("x.md").tobuf())
        header[124:136] = (size & (1 << 96) - 1 | 1 << 95 if size > 0 else size % (1 << 96)).to_bytes(12, "big")
        header[156:157] = type
        header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:]))
        path = write_tar(folder / "t.tar", ("a.json", QUESTIONS[1]))
        path.write_bytes(path.read_bytes()[:1024] + header + bytes(1024))
        rows, problems = rows_of(path)
        assert not rows
        assert len(problems) == 1
        assert re.fullmatch(rf"t\.tar, row 1: from here on the tar cannot be read \({reason}\); {AGAIN}", problems[0])

    @pytest.mark.parametrize(
        ("members", "problem"),
        [
            ([("b.json", b'{"a":')],
             "row 2, id b: the sample's .json cannot be read (Expecting value: line 1 column 6 (char 5)); "
             "write a row as JSON, all text in UTF-8"),
            ([("b.json", b"[" * 100_000)],
             "row 2, id b: the sample's .json cannot be read (nested too deeply); "
             "write a row as JSON, all text in UTF-8"),
            ([("b.txt", b"\xff"), ("b.png", RED)],
             "row 2, id b: the sample's caption cannot be read ('utf-8' codec can't decode byte 0xff in position 0: "
             "invalid start byte); write a row as JSON, all text in UTF-8"),
            ([("b.png", RED)],
             "row 2, id b: the sample has neither a .json that holds its row nor a .txt that holds its caption; "
             "pack one of them directly beside its pictures"),
            ([("b.txt", b"Hm.")],
             "row 2, id b: the sample has a caption and no picture; pack it directly beside its picture"),
            ([("b.json", ROWS[1]), ("b.png", RED), ("b.json", ROWS[1])],
             "row 2, id b: the sample has several .json or .txt files; keep one of each"),
        ],
    )  # fmt: skip
    def test_samples_that_are_broken_are_said_and_the_rest_is_read(
        self, folder: Path, members: list[tuple[str, Any]], problem: str
    ) -> None:
        path = write_tar(folder / "t.tar", ("a.json", ROWS[1]), *members, ("c.json", ROWS[1]))
        rows, problems = rows_of(path)
        assert problems == [f"t.tar, {problem}."]
        assert [str(place) for place, _ in rows] == ["t.tar, row 1", "t.tar, row 3"]

    @pytest.mark.parametrize("content", [None, [], 3])
    def test_json_that_is_no_row_does_not_vanish(self, folder: Path, content: Any) -> None:
        path = write_tar(folder / "t.tar", ("a.json", content))
        with pytest.raises(RowError, match="row 1: a row is a JSON object, not"):
            read_examples(path)

    @pytest.mark.parametrize(
        ("damage", "reason", "left"),
        [
            (lambda data: data[:3000], "it is cut off", 0),
            (lambda data: data[:3072], "it is cut off", 1),  # between two samples: who knows whether b was whole
            (lambda data: data[:2048], "it is cut off", 0),  # the header of b, and nothing of it
            (lambda data: data[:1700], DAMAGED, 0),
            (lambda data: data[:1536] + b"x" + data[1537:], DAMAGED, 0),
            (lambda data: data + data, DAMAGED, 2),
            (lambda data: data[:100] + b"x" + data[101:], "bad checksum", 0),
        ],
    )
    def test_a_tar_that_is_broken(self, folder: Path, damage: Callable[[bytes], bytes], reason: str, left: int) -> None:
        row = {"conversations": turns("Hello " * 150, "No.")}  # two blocks
        path = write_tar(folder / "t.tar", ("a.json", row), ("b.json", row), ("c.json", row))
        path.write_bytes(damage(path.read_bytes()))
        rows, problems = rows_of(path)
        place = f"t.tar, row {left + 1}"
        assert problems == [f"{place}: from here on the tar cannot be read ({reason}); {AGAIN}"]
        assert len(rows) == left

    def test_memory_does_not_grow_with_the_rows(self, folder: Path) -> None:
        """The members that tarfile remembers, unless its list is emptied, are what would grow."""
        row = {"conversations": turns("Hello", "No.")}
        peaks = []
        for number in (200, 2000):
            path = write_tar(folder / f"{number}.tar", *((f"{i}.json", row) for i in range(number)))
            tracemalloc.start()
            assert sum(1 for _ in read_rows(path)) == number
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert peaks[1] < peaks[0] * 1.2


class TestFolders:
    @pytest.mark.parametrize("shards", [1, 3])
    def test_a_saved_dataset(self, folder: Path, shards: int) -> None:
        turn = {"from": Value("string"), "value": Value("string")}
        features = Features(
            {"id": Value("string"), "images": List(Image()), "conversations": List(turn), "type": Value("string")}
        )
        rows = [{"type": None} | embedded(row, listed=True) for row in ROWS]
        data = Dataset.from_list(rows, features=features)
        data.save_to_disk(folder / "saved", num_shards=shards)
        (folder / "saved" / "cache-0123.arrow").write_bytes(b"what `map` leaves there")
        assert said(read_examples(folder / "saved")) == as_jsonl(folder, ROWS)
        last = list(read_rows(folder / "saved"))[-1][0]
        assert str(last) == f"data-0000{shards - 1}-of-0000{shards}.arrow, row {4 if shards == 1 else 1}"

    def test_splits_are_named(self, folder: Path) -> None:
        data = Dataset.from_list(QUESTIONS)
        DatasetDict({"train": data, "test": data}).save_to_disk(folder / "saved")
        assert rows_of(folder / "saved") == (
            [],
            [f"{folder}/saved: the folder holds several datasets (test, train); name the folder of one of them."],
        )
        assert len(read_examples(folder / "saved" / "train", folder)) == 3

    @pytest.mark.parametrize("inner", ["", "data"])
    @pytest.mark.parametrize("kind", ["parquet", "arrow", "tar"])
    def test_shards_in_the_order_of_their_names(self, folder: Path, kind: str, inner: str) -> None:
        (folder / "s" / inner).mkdir(parents=True, exist_ok=True)
        for number in (2, 1):
            path = folder / "s" / inner / f"train-{number}.{kind}"
            row = {"question": "Which?", "answer": str(number)}
            if kind == "tar":
                write_tar(path, ("a.json", row))
            else:
                write_columns(path, [row], "parquet" if kind == "parquet" else "arrow stream")
        (folder / "s" / "notes.md").write_text("x")
        rows, problems = rows_of(folder / "s")
        assert not problems
        assert [(str(place), row["answer"]) for place, row in rows] == [
            (f"train-{number}.{kind}, row 1", str(number)) for number in (1, 2)
        ]

    def test_nothing_in_it(self, folder: Path) -> None:
        assert rows_of(folder)[1] == [
            f"{folder}: this is a folder without data files; "
            f"name a file, or a folder of Parquet, Arrow or tar files: {FORMATS}."
        ]

    @pytest.mark.parametrize(
        ("names", "problem"),
        [
            (["a.tar", "b.parquet"], "the folder holds files of several kinds (Parquet, tar); "
             "keep one kind in it, or name one file"),
            (["train-0.tar", "test-0.tar"], "the folder holds the files of several datasets (test, train); "
             "give each a folder of its own"),
        ],
    )  # fmt: skip
    def test_files_that_do_not_belong_together(self, folder: Path, names: list[str], problem: str) -> None:
        for name in names:
            (folder / name).touch()
        assert rows_of(folder) == ([], [f"{folder}: {problem}."])

    def test_shards_that_are_broken_are_said_and_the_rest_is_read(self, folder: Path) -> None:
        (folder / "1.parquet").symlink_to("1.parquet")
        (folder / "2.parquet").touch()
        write_columns(folder / "3.parquet", QUESTIONS, "parquet")
        rows, problems = rows_of(folder)
        assert len(rows) == 3
        assert problems == [
            f"{folder}/1.parquet: the data file cannot be read (Too many levels of symbolic links); "
            "check the folder it lies in.",
            f"{folder}/2.parquet: the file is neither text nor Parquet, Arrow, tar; {FORMATS}.",
        ]

    @pytest.mark.parametrize("state", ["", "[]", "{}", '{"_data_files": 3}', '{"_data_files": [{"filename": 3}]}'])
    def test_a_state_that_is_broken(self, folder: Path, state: str) -> None:
        (folder / "state.json").write_text(state)
        assert rows_of(folder)[1] == [
            f"{folder}/state.json: this does not name the files of a saved dataset; save it again."
        ]

    @pytest.mark.parametrize(
        ("name", "reason"), [("../data-1.arrow", "No such file or directory"), ("a\0", "embedded null byte")]
    )
    def test_a_state_that_names_what_is_not_there(self, folder: Path, name: str, reason: str) -> None:
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        place = Place(str(folder / Path(name).name))
        assert rows_of(folder)[1] == [f"{place}: the data file cannot be read ({reason}); check the folder it lies in."]


class TestOtherBytes:
    @pytest.mark.parametrize(
        ("data", "problem"),
        [
            (b"\x1f\x8b\x08\0", f"the file is compressed (gzip); unpack it first: {FORMATS}"),
            (b"PK\x03\x04\x14\0", f"the file is compressed (zip); unpack it first: {FORMATS}"),
            (b"\xfd7zXZ\0", f"the file is compressed (xz); unpack it first: {FORMATS}"),
            (RED, f"the file is neither text nor Parquet, Arrow, tar; {FORMATS}"),
            (b"{\0", f"the file is neither text nor Parquet, Arrow, tar; {FORMATS}"),
        ],
    )
    def test_they_are_refused(self, folder: Path, data: bytes, problem: str) -> None:
        (folder / "train.json").write_bytes(data)
        assert rows_of(folder / "train.json") == ([], [f"{folder}/train.json: {problem}."])

    def test_a_compressed_tar_is_refused(self, folder: Path) -> None:
        with tarfile.open(folder / "t.tar.gz", "w:gz") as tar:
            add(tar, "a.json", ROWS[1])
        assert rows_of(folder / "t.tar.gz")[1] == [
            f"{folder}/t.tar.gz: the file is compressed (gzip); unpack it first: {FORMATS}."
        ]

    @pytest.mark.parametrize("kind", [*KINDS, "tar", "csv"])
    def test_damage_anywhere_is_a_problem_and_nothing_else(self, folder: Path, kind: str) -> None:
        """What is not noticed may read differently, but nothing is raised."""
        path = folder / "t.any"
        if kind == "tar":
            write_tar(path, ("a.json", ROWS[0]), ("a.png", RED), ("b" * 120 + ".txt", b"Hm."), ("c.json", ROWS[1]))
        elif kind == "csv":
            table(path)
        else:
            write_columns(path, [embedded(row, listed=True) for row in ROWS], kind)
        whole, dice, noticed = path.read_bytes(), random.Random(7), 0
        for _ in range(150):
            data = bytearray(whole)
            for _ in range(dice.choice((1, 1, 4, 40))):
                data[dice.randrange(len(data))] = dice.choice((0, 1, 34, 44, 127, 128, 255, dice.randrange(256)))
            path.write_bytes(data[: dice.choice((len(data), len(data), dice.randrange(len(data))))])
            noticed += bool(rows_of(path)[1])
        assert noticed > 50


class TestUnpack:
    @pytest.mark.parametrize(
        ("form", "suffix"),
        [("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp"), ("GIF", ".gif"), ("BMP", ".bmp"), ("TIFF", ".tif")],
    )
    def test_it_is_named_by_what_it_holds(self, tmp_path: Path, form: str, suffix: str) -> None:
        file = io.BytesIO()
        Pillow.new("RGB", (4, 4)).save(file, form)
        digest = hashlib.sha256(file.getvalue()).hexdigest()
        path = unpack(file.getvalue())
        assert path == tmp_path / "cache" / "pictures" / digest[:2] / f"{digest[:32]}{suffix}"
        assert path.read_bytes() == file.getvalue()
        assert unpack(b"what is this").suffix == ".bin"

    def test_it_is_written_once_and_mended_when_it_is_cut_off(self) -> None:
        path = unpack(RED)
        before = path.stat()
        assert unpack(RED) == path
        assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
        path.write_bytes(b"")
        assert unpack(RED).read_bytes() == RED

    def test_many_may_write_at_the_same_time(self, tmp_path: Path) -> None:
        start, data = threading.Barrier(8), bytes(1 << 16)
        seen: list[int] = []

        def write() -> None:
            start.wait()
            seen.append(len(unpack(data).read_bytes()))

        threads = [threading.Thread(target=write) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == [1 << 16] * 8
        assert len([p for p in (tmp_path / "cache").rglob("*") if p.is_file()]) == 1

    def test_what_cannot_be_finished_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(self: Path, target: Path) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "replace", full)
        with pytest.raises(InputError, match="No space left on device"):
            unpack(RED)
        assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]

    def test_a_cache_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("in the way")
        with pytest.raises(InputError) as error:
            unpack(RED)
        assert str(error.value) == (
            f"{tmp_path}/cache/pictures: the pictures of the data file cannot be unpacked here (Not a directory); "
            "make room, or set QLLAVA_CACHE to another folder."
        )


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda text: bool(text.strip()) and "<" not in text
)


@st.composite
def llava_rows(draw: st.DrawFn) -> dict[str, Any]:
    """LLaVA rows of every shape: pictures in any turn and place, a system prompt, an answer too many at the start."""
    said: list[dict[str, str]] = []
    pictures = 0
    for _ in range(draw(st.integers(1, 3))):
        pieces = [draw(words)]
        for _ in range(draw(st.integers(0, 2))):
            pieces.insert(draw(st.integers(0, len(pieces))), IMAGE_TOKEN)
            pictures += 1
        said += turns(draw(st.sampled_from(["", "\n", " "])).join(pieces), draw(words))
    if draw(st.booleans()):
        said.insert(0, {"from": "gpt", "value": draw(words)})
    if draw(st.booleans()):
        said.insert(0, {"from": "system", "value": draw(words | st.just(""))})
    row: dict[str, Any] = {"conversations": said}
    names = [draw(st.sampled_from(["red.png", "./blue.png", "deep/../red.png"])) for _ in range(pictures)]
    if names:
        row["image"] = names[0] if len(names) == 1 and draw(st.booleans()) else names
    for key, value in (("id", words | st.integers()), ("type", words | st.just(""))):
        if draw(st.booleans()):
            row[key] = draw(value)
    return row


class TestConvert:
    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(row=llava_rows())
    def test_llava_to_messages_and_back_loses_nothing(self, folder: Path, row: dict[str, Any]) -> None:
        pictures = Pictures(folder)
        first = to_example(row, Place("a.json", row=3), pictures)
        example = replace(first, lost=False)  # a leading answer is dropped at the first reading, and then is not there
        messages = json.loads(json.dumps(messages_row(example, folder)))
        again = to_example(messages, Place("b.json", row=1), pictures)
        assert replace(again, place=example.place) == example
        back = json.loads(json.dumps(llava_row(again, folder)))
        last = to_example(back, Place("c.json", row=2), pictures)
        assert replace(last, place=example.place) == example
        assert messages_row(last, folder) == messages
        assert llava_row(last, folder) == back

    @pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
    def test_rows_that_are_in_order_come_back_as_they_were(self, folder: Path, row: dict[str, Any]) -> None:
        example = to_example(row, Place("a.json"), Pictures(folder))
        assert llava_row(example, folder) == row

    def test_messages(self, folder: Path) -> None:
        example = to_example(ROWS[3], Place("a.json"), Pictures(folder))
        assert messages_row(example, folder) == {
            "id": "late",
            "images": ["blue.png"],
            "messages": [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Yes?"},
                {"role": "user", "content": "<image>\nThis?"},
                {"role": "assistant", "content": "Blue."},
            ],
        }

    def test_a_picture_of_another_folder(self, folder: Path, tmp_path: Path) -> None:
        example = to_example(ROWS[0], Place("a.json", row=1), Pictures(folder))
        with pytest.raises(RowError) as error:
            llava_row(example, tmp_path / "other")
        assert str(error.value) == (
            f"a.json, row 1, id one: the picture '{folder}/red.png' lies outside the image folder {tmp_path}/other; "
            "copy it there, or give the folder it lies in."
        )
