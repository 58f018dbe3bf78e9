"""Text that is no Unicode: a lone surrogate is an error by place and id, in every field, format and reader.

JSON can spell half of a character (`"\\ud800"`). The other formats hold bytes: there it is text that is not UTF-8.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qllava.config import InputError
from qllava.conversation import Conversation, Turn
from qllava.data.formats import read_examples
from qllava.data.problems import Place, RecordError, Unusable, check_unicode, is_unicode
from qllava.data.records import record_id, record_text
from tests.data.test_keys import KINDS

HALF = "a\ud800b"
TALK = [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "Yes."}]
CHAT = [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Yes."}]

# field: a record in which it is half a character, and what is said of it
FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "question": ({"question": HALF, "answer": "Yes."}, "turn 1 contains half of a character"),
    "answer": ({"question": "Hm?", "answer": HALF}, "turn 2 contains half of a character"),
    "human": ({"conversations": [TALK[0] | {"value": HALF}, TALK[1]]}, "turn 1 contains half of a character"),
    "gpt": ({"conversations": [TALK[0], TALK[1] | {"value": HALF}]}, "turn 2 contains half of a character"),
    "system turn": ({"conversations": [{"from": "system", "value": HALF}, *TALK]}, "the system prompt contains half"),
    "system": ({"system": HALF, "conversations": TALK}, "the system prompt contains half of a character"),
    "content": ({"messages": [CHAT[0] | {"content": HALF}, CHAT[1]]}, "turn 1 contains half of a character"),
    "part": ({"messages": [CHAT[0] | {"content": [{"type": "text", "text": HALF}]}, CHAT[1]]}, "turn 1 contains half"),
    "instruction": ({"instruction": HALF, "output": "Yes."}, "turn 1 contains half of a character"),
    "input": ({"instruction": "Hm?", "input": HALF, "output": "Yes."}, "turn 1 contains half of a character"),
    "output": ({"instruction": "Hm?", "output": HALF}, "turn 2 contains half of a character"),
    "history": ({"instruction": "Hm?", "output": "Yes.", "history": [["a", HALF]]}, "turn 2 contains half"),
    "caption": ({"image": "a.png", "caption": HALF}, "turn 2 contains half of a character"),
    "image": ({"image": HALF, "question": "Hm?", "answer": "Yes."}, "the path of the image 'a\\ud800b' is not UTF-8"),
    "type": ({"question": "Hm?", "answer": "Yes.", "type": HALF}, "the type contains half of a character"),
    "role": ({"conversations": [TALK[0] | {"from": HALF}, TALK[1]]}, "turn 1 has 'from': 'a\\ud800b'"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    return tmp_path


@pytest.mark.parametrize("kind", ["list.json", "lines.jsonl", "t.tar"])  # those that JSON is in
@pytest.mark.parametrize("field", FIELDS)
def test_half_a_character_is_an_error_of_its_record(folder: Path, field: str, kind: str) -> None:
    record, message = FIELDS[field]
    (folder / kind).write_bytes(KINDS[kind]([{"question": "a", "answer": "b"}, {"id": "x7"} | record]))
    with pytest.raises(RecordError) as error:
        read_examples(folder / kind)
    place = {"list.json": "example 2", "lines.jsonl": "line 2", "t.tar": "example 2"}[kind]
    said = str(error.value)
    assert said.startswith(f"{kind}, {place}, id x7: {message}"), said
    assert said.isprintable() and said.encode()


@pytest.mark.parametrize("kind", ["list.json", "lines.jsonl", "t.tar"])
def test_half_a_character_in_an_id_and_in_a_key(folder: Path, kind: str) -> None:
    (folder / kind).write_bytes(KINDS[kind]([{"id": HALF, "question": "a", "answer": "b"}]))
    with pytest.raises(RecordError, match="1: the id contains half of a character"):
        read_examples(folder / kind)
    (folder / kind).write_bytes(KINDS[kind]([{"question": "a", "answer": "b", HALF: 1}]))
    assert read_examples(folder / kind)[0].unread == (HALF,)  # it is reported, escaped, and harms nothing


@pytest.mark.parametrize("kind", ["list.json", "lines.jsonl", "t.tar"])
def test_both_halves_are_a_character(folder: Path, kind: str) -> None:
    (folder / kind).write_bytes(KINDS[kind]([{"id": "😀", "question": "😀?", "answer": "\U0001f600"}]))
    (example,) = read_examples(folder / kind)
    assert example.conversation == Conversation((Turn("user", "😀?"), Turn("assistant", "😀")))


def _column(text: bytes) -> pa.Table:
    return pa.table({"question": pa.array([text], pa.binary()).view(pa.string()), "answer": ["b"]})


def _write_arrow(path: Path, new: Callable[..., Any]) -> None:
    table = _column(b"\xed\xa0\x80")
    with path.open("wb") as file, new(file, table.schema) as writer:
        writer.write_table(table)


def _write_tar(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        tar.add(path.parent / "a.png", "one.png")
        (path.parent / "text").write_bytes(b"\xed\xa0\x80")
        tar.add(path.parent / "text", "one.txt")


# Bytes that spell half a character are not UTF-8.
BYTES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "t.json": (lambda p: p.write_bytes(b'[{"question": "\xed\xa0\x80", "answer": "b"}]'), "is not UTF-8 text"),
    "t.jsonl": (lambda p: p.write_bytes(b'{"question": "\xed\xa0\x80", "answer": "b"}'), "is not UTF-8 text"),
    "t.csv": (lambda p: p.write_bytes(b"question,answer\n\xed\xa0\x80,b\n"), "is not UTF-8 text"),
    "t.parquet": (
        lambda p: pq.write_table(_column(b"\xed\xa0\x80"), p),
        "example 1: from here on the Parquet file cannot",
    ),
    "t.arrow": (lambda p: _write_arrow(p, pa.ipc.new_file), "example 1: from here on the Arrow file cannot"),
    "s.arrow": (lambda p: _write_arrow(p, pa.ipc.new_stream), "example 1: from here on the Arrow stream cannot"),
    "t.tar": (_write_tar, "example 1, id one: the sample's caption cannot be read"),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_that_are_no_utf8_are_an_error_of_the_file(folder: Path, name: str) -> None:
    write, message = BYTES[name]
    write(folder / name)
    with pytest.raises(RecordError, match=message):
        read_examples(folder / name)


def test_the_readers_of_answers_use_the_same_check() -> None:
    place = Place("answers.jsonl", line=3)
    row = json.loads(json.dumps({"question_id": HALF, "text": HALF}))
    with pytest.raises(InputError, match="line 3: the question_id contains half of a character"):
        record_id(row, place, "question_id")
    with pytest.raises(InputError, match="line 3, id q: the text contains half of a character"):
        record_text(row, "text", place, "q")


def test_the_check_itself() -> None:
    assert is_unicode("") and is_unicode("é😀\0\u2028") and not is_unicode("\udfff")
    check_unicode("é😀", "the text")
    with pytest.raises(Unusable, match="the text contains half"):
        check_unicode("\ud83d", "the text")
