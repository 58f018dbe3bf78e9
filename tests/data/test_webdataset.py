"""Tars become the same examples as JSONL, and what is broken in them is reported."""

from __future__ import annotations

import re
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qllava.conversation import Conversation, Turn
from qllava.data.formats import read_examples
from qllava.data.problems import RecordError
from qllava.data.records import read_records
from tests.data.container_files import (
    AGAIN,
    BLUE,
    QUESTIONS,
    RED,
    ROWS,
    add,
    as_jsonl,
    packs_of,
    png,
    said,
    turns,
    write_tar,
)

DAMAGED = "a header is corrupt or truncated, or another tar was appended"


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
            (id, images, Conversation((Turn("user", asked), Turn("assistant", caption))), None, False)
            for id, images, asked, caption in [
                ("a/1", [RED], "<image>", "Ein rötliches Bild."),
                ("b/1", [BLUE, RED], "<image>\n<image>", "Two."),
                ("7", [RED], "<image>", "More."),
            ]
        ]

    def test_images_with_numbers_stand_in_their_order(self, folder: Path) -> None:
        row = {"conversations": turns("<image>" * 12, "Yes.")}
        members = [(f"s.{i}.png", png(f"#0000{i:02x}")) for i in range(12)]
        path = write_tar(folder / "t.tar", ("s.json", row), *sorted(members))
        assert [p.read_bytes() for p in read_examples(path)[0].images] == [data for _, data in members]

    def test_a_row_without_images_in_the_tar_names_files_of_the_folder(self, folder: Path) -> None:
        path = write_tar(folder / "t.tar", ("one.json", ROWS[0]))
        assert read_examples(path)[0].images == (folder / "red.png",)

    def test_names_that_leave_the_folder_are_harmless(self, folder: Path, tmp_path: Path) -> None:
        row = {"conversations": turns("<image>\nWhat?", "This.")}
        path = write_tar(folder / "t.tar", ("../../evil/x.json", row), ("../../evil/x.png", RED), ("/x.json", row))
        rows, problems = packs_of(path)
        assert not problems
        assert [row["id"] for _, row in rows] == ["../../evil/x", "/x"]
        assert rows[0][1]["images"][0].is_relative_to(tmp_path / "cache" / "pictures")

    @pytest.mark.parametrize("type", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.GNUTYPE_SPARSE])
    def test_links_are_not_followed(self, folder: Path, type: bytes) -> None:
        """Nor does a question lose its image because it is one; a sparse file may claim any size."""
        with tarfile.open(folder / "t.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            add(tar, "x.json", QUESTIONS[1])
            link = tarfile.TarInfo("x.png")
            link.type, link.linkname = type, "x.json"
            tar.addfile(link)
            add(tar, "y.json", QUESTIONS[1])
            inner = tarfile.TarInfo("y.png")  # a folder is no image, whatever its name
            inner.type = tarfile.DIRTYPE
            tar.addfile(inner)
        rows, problems = packs_of(folder / "t.tar")
        assert problems == [
            "t.tar, example 1, id x: the sample contains a link, or a sparse file; pack the file itself."
        ]
        assert [str(place) for place, _ in rows] == ["t.tar, example 2"]

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
        rows, problems = packs_of(path)
        assert not rows
        assert len(problems) == 1
        assert re.fullmatch(
            rf"t\.tar, example 1: from here on the tar cannot be read \({reason}\); {AGAIN}", problems[0]
        )

    @pytest.mark.parametrize(
        ("members", "problem"),
        [
            ([("b.json", b'{"a":')],
             "example 2, id b: the sample's .json cannot be read (Expecting value: line 1 column 6 (char 5)); "
             "write an example as JSON, all text in UTF-8"),
            ([("b.json", b"[" * 100_000)],
             "example 2, id b: the sample's .json cannot be read (nested too deeply); "
             "write an example as JSON, all text in UTF-8"),
            ([("b.txt", b"\xff"), ("b.png", RED)],
             "example 2, id b: the sample's caption cannot be read ('utf-8' codec can't decode byte 0xff in position "
             "0: invalid start byte); write an example as JSON, all text in UTF-8"),
            ([("b.png", RED)],
             "example 2, id b: the sample has neither a .json that contains its example nor a .txt that contains "
             "its caption; pack one of them directly beside its images"),
            ([("b.txt", b"Hm.")],
             "example 2, id b: the sample has a caption and no image; pack it directly beside its image"),
            ([("b.json", ROWS[1]), ("b.png", RED), ("b.json", ROWS[1])],
             "example 2, id b: the sample has several .json or .txt files; keep one of each"),
        ],
    )  # fmt: skip
    def test_samples_that_are_broken_are_said_and_the_rest_is_read(
        self, folder: Path, members: list[tuple[str, Any]], problem: str
    ) -> None:
        path = write_tar(folder / "t.tar", ("a.json", ROWS[1]), *members, ("c.json", ROWS[1]))
        rows, problems = packs_of(path)
        assert problems == [f"t.tar, {problem}."]
        assert [str(place) for place, _ in rows] == ["t.tar, example 1", "t.tar, example 3"]

    @pytest.mark.parametrize("content", [None, [], 3])
    def test_json_that_is_no_row_does_not_vanish(self, folder: Path, content: Any) -> None:
        path = write_tar(folder / "t.tar", ("a.json", content))
        with pytest.raises(RecordError, match="example 1: an example is a JSON object, not"):
            read_examples(path)

    @pytest.mark.parametrize(
        ("damage", "reason", "left"),
        [
            (lambda data: data[:3000], "the file is truncated", 0),
            (lambda data: data[:3072], "the file is truncated", 1),  # between two samples: b may be incomplete
            (lambda data: data[:2048], "the file is truncated", 0),  # the header of b, and nothing of it
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
        rows, problems = packs_of(path)
        place = f"t.tar, example {left + 1}"
        assert problems == [f"{place}: from here on the tar cannot be read ({reason}); {AGAIN}"]
        assert len(rows) == left

    def test_memory_does_not_grow_with_the_rows(self, folder: Path) -> None:
        """The members that tarfile remembers, unless its list is emptied, are what would grow."""
        row = {"conversations": turns("Hello", "No.")}
        peaks = []
        for number in (200, 2000):
            path = write_tar(folder / f"{number}.tar", *((f"{i}.json", row) for i in range(number)))
            tracemalloc.start()
            assert sum(1 for _ in read_records(path)) == number
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert peaks[1] < peaks[0] * 1.2
