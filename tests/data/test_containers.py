"""Folders of data files are read as one, bytes that are no data file are refused, and no damage raises."""

from __future__ import annotations

import json
import random
import tarfile
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value

from qllava.data.formats import read_examples
from qllava.data.problems import Place
from qllava.data.records import read_records
from tests.data.container_files import (
    FORMATS,
    KINDS,
    QUESTIONS,
    RED,
    ROWS,
    add,
    as_jsonl,
    embedded,
    packs_of,
    said,
    table,
    write_columns,
    write_tar,
)


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
        last = list(read_records(folder / "saved"))[-1][0]
        assert str(last) == f"data-0000{shards - 1}-of-0000{shards}.arrow, example {4 if shards == 1 else 1}"

    def test_splits_are_named(self, folder: Path) -> None:
        data = Dataset.from_list(QUESTIONS)
        DatasetDict({"train": data, "test": data}).save_to_disk(folder / "saved")
        assert packs_of(folder / "saved") == (
            [],
            [f"{folder}/saved: the folder contains several datasets (test, train); name the folder of one of them."],
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
        rows, problems = packs_of(folder / "s")
        assert not problems
        assert [(str(place), row["answer"]) for place, row in rows] == [
            (f"train-{number}.{kind}, example 1", str(number)) for number in (1, 2)
        ]

    def test_nothing_in_it(self, folder: Path) -> None:
        assert packs_of(folder)[1] == [
            f"{folder}: this is a folder without data files; "
            f"name a file, or a folder of Parquet, Arrow or tar files: {FORMATS}."
        ]

    @pytest.mark.parametrize(
        ("names", "problem"),
        [
            (["a.tar", "b.parquet"], "the folder contains files of several kinds (Parquet, tar); "
             "keep one kind in it, or name one file"),
            (["train-0.tar", "test-0.tar"], "the folder contains the files of several datasets (test, train); "
             "give each a folder of its own"),
        ],
    )  # fmt: skip
    def test_files_that_do_not_belong_together(self, folder: Path, names: list[str], problem: str) -> None:
        for name in names:
            (folder / name).touch()
        assert packs_of(folder) == ([], [f"{folder}: {problem}."])

    def test_shards_that_are_broken_are_said_and_the_rest_is_read(self, folder: Path) -> None:
        (folder / "1.parquet").symlink_to("1.parquet")
        (folder / "2.parquet").touch()
        write_columns(folder / "3.parquet", QUESTIONS, "parquet")
        rows, problems = packs_of(folder)
        assert len(rows) == 3
        assert problems == [
            f"{folder}/1.parquet: the data file cannot be read (Too many levels of symbolic links); check its folder.",
            f"{folder}/2.parquet: the file is neither text nor Parquet, Arrow, tar; {FORMATS}.",
        ]

    @pytest.mark.parametrize("state", ["", "[]", "{}", '{"_data_files": 3}', '{"_data_files": [{"filename": 3}]}'])
    def test_a_state_that_is_broken(self, folder: Path, state: str) -> None:
        (folder / "state.json").write_text(state)
        assert packs_of(folder)[1] == [
            f"{folder}/state.json: this file does not list the data files of a saved dataset; save it again."
        ]

    @pytest.mark.parametrize(
        ("name", "reason"), [("../data-1.arrow", "No such file or directory"), ("a\0", "embedded null byte")]
    )
    def test_a_state_that_names_what_is_not_there(self, folder: Path, name: str, reason: str) -> None:
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        place = Place(str(folder / Path(name).name))
        assert packs_of(folder)[1] == [f"{place}: the data file cannot be read ({reason}); check its folder."]


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
        assert packs_of(folder / "train.json") == ([], [f"{folder}/train.json: {problem}."])

    def test_a_compressed_tar_is_refused(self, folder: Path) -> None:
        with tarfile.open(folder / "t.tar.gz", "w:gz") as tar:
            add(tar, "a.json", ROWS[1])
        assert packs_of(folder / "t.tar.gz")[1] == [
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
            noticed += bool(packs_of(path)[1])
        assert noticed > 50
