"""Parquet and Arrow become the same examples as JSONL, and what is broken in them is reported."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from qllava.data.formats import ImageFolder, read_examples, to_example
from qllava.data.problems import Place, RecordError
from qllava.data.records import read_records
from tests.data.container_files import (
    AGAIN,
    KINDS,
    QUESTIONS,
    RED,
    ROWS,
    as_jsonl,
    embedded,
    packs_of,
    said,
    write_columns,
)


class TestColumns:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("rows", [ROWS[:2] + ROWS[3:], QUESTIONS], ids=["llava", "question"])
    def test_names_of_images(self, folder: Path, kind: str, rows: list[dict[str, Any]]) -> None:
        path = write_columns(folder / "t.any", rows, kind)
        assert said(read_examples(path)) == as_jsonl(folder, rows)

    @pytest.mark.parametrize("kind", KINDS)
    def test_embedded_images(self, folder: Path, kind: str) -> None:
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
        with pytest.raises(RecordError, match="the image must be a file name or a list of file names"):
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
        assert packs_of(path)[0][0][1] == row
        assert said(read_examples(path)) == as_jsonl(folder, [row])

    def test_conversations_as_json_text(self, folder: Path) -> None:
        rows = [row | {"conversations": json.dumps(row["conversations"])} for row in ROWS[:2]]
        rows.append({"id": "bad", "conversations": "[{'from': 'human'}]"})
        rows.append({"id": "words", "conversations": "none"})
        found, problems = packs_of(write_columns(folder / "t.parquet", rows, "parquet"))
        images = ImageFolder(folder)
        assert said([to_example(row, place, images) for place, row in found[:2]]) == as_jsonl(folder, ROWS[:2])
        assert not problems
        bad = "t.parquet, example 3, id bad: the text under conversations begins with [ and is not valid JSON; write it"
        with pytest.raises(RecordError, match=re.escape(bad)):
            to_example(found[2][1], found[2][0], images)
        with pytest.raises(RecordError, match="conversations must be a list of turns, not a text"):
            to_example(found[3][1], found[3][0], images)

    @pytest.mark.parametrize("kind", KINDS)
    def test_rows_are_counted_and_of_other_columns_only_their_names_are_read(self, folder: Path, kind: str) -> None:
        rows = [{"question": str(i), "answer": "yes", "vector": [0.5] * 3} for i in range(150)]
        path = write_columns(folder / "t.any", rows, kind)
        found, problems = packs_of(path)
        assert not problems
        assert [place for place, _ in found] == [Place(str(path), row=i) for i in range(1, 151)]
        assert [row for _, row in found] == [{"question": str(i), "answer": "yes", "vector": True} for i in range(150)]

    @pytest.mark.parametrize("kind", KINDS)
    def test_other_columns_are_refused_at_once(self, folder: Path, kind: str) -> None:
        path = write_columns(folder / "t.any", [{"text": "a", "answer": "b"}] * 3, kind)
        assert packs_of(path) == (
            [],
            [
                f"{path}: the table needs one of the columns conversations, messages, question; "
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
            found, problems = packs_of(path)
            place = f"t.any, example {len(found) + 1}"
            assert len(problems) == 1
            assert problems[0].startswith(f"{place}: from here on the {said} cannot be read (")
            assert problems[0].endswith(f"); {AGAIN}")

    def test_a_stream_without_its_end_mark(self, folder: Path) -> None:
        path = write_columns(folder / "t.any", [{"question": "a", "answer": "b"}] * 4, "arrow stream")
        path.write_bytes(path.read_bytes()[:-8])
        rows, problems = packs_of(path)
        assert len(rows) == 4
        assert problems == [
            "t.any, example 5: from here on the Arrow stream cannot be read (the file is truncated (its end mark is "
            f"missing)); {AGAIN}"
        ]

    def test_checksums_of_pages_are_looked_at(self, folder: Path) -> None:
        rows = pa.table({"question": ["What is it?"], "answer": ["A red bus."]})
        path = folder / "t.parquet"
        pq.write_table(
            rows, path, compression="none", use_dictionary=False, write_statistics=False, write_page_checksum=True
        )
        path.write_bytes(path.read_bytes().replace(b"A red bus.", b"A red bug."))
        found, problems = packs_of(path)
        assert not found
        assert len(problems) == 1
        assert problems[0].startswith("t.parquet, example 1: from here on the Parquet file cannot be read (")

    def test_a_row_group_is_not_held_as_a_whole(self, folder: Path) -> None:
        dice = random.Random(7)
        rows = [{"question": "What?", "answer": dice.randbytes(5000).hex()} for _ in range(2000)]
        pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet", use_dictionary=False, write_batch_size=50)
        before = pa.total_allocated_bytes()
        held = [pa.total_allocated_bytes() - before for _ in read_records(folder / "t.parquet")]
        assert len(held) == 2000
        assert max(held) < 8 << 20 < (folder / "t.parquet").stat().st_size

    def test_text_that_is_no_utf8(self, folder: Path) -> None:
        question = pa.array([b"a", b"\xff"], pa.binary()).view(pa.string())
        pq.write_table(pa.table({"question": question, "answer": ["a", "b"]}), folder / "t.parquet")
        _, problems = packs_of(folder / "t.parquet")
        assert len(problems) == 1
        assert problems[0].startswith("t.parquet, example 1: from here on the Parquet file cannot be read (")
