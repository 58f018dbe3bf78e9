"""Helpers of the tests of tables, Parquet, Arrow, tars and folders: examples with images, and files of them."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
from PIL import Image as Pillow

from qllava.data.formats import Example, read_examples
from qllava.data.problems import Place
from qllava.data.records import read_records

FORMATS = (
    "a data file is a JSON list of examples, one example per line, a table (CSV), Parquet, Arrow or a WebDataset tar"
)
AGAIN = "download it or write it again."


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


def said(examples: list[Example]) -> list[Any]:
    """Return everything that is learned, with the bytes of images and without places in files."""
    return [(e.id, [p.read_bytes() for p in e.images], e.conversation, e.type, e.lost) for e in examples]


def as_jsonl(folder: Path, rows: list[dict[str, Any]]) -> list[Any]:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    try:
        return said(read_examples(path))
    finally:
        path.unlink()


def packs_of(path: Path) -> tuple[list[tuple[Place, Any]], list[str]]:
    """Return the examples, and the problems as the user reads them."""
    problems: list[str] = []
    return list(read_records(path, lambda problem: problems.append(str(problem)))), problems


def table(path: Path, delimiter: str = ",", header: str = "id,image,question,answer,type") -> None:
    def quoted(value: str) -> str:
        return '"' + value.replace('"', '""') + '"' if re.search('[",;\t\n]', value) else value

    keys = ("id", "image", "question", "answer", "type")
    lines = [header.replace(",", delimiter)]
    lines += [delimiter.join(quoted(row.get(key, "")) for key in keys) for row in QUESTIONS]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def embedded(row: dict[str, Any], *, listed: bool = False) -> dict[str, Any]:
    """Return an example whose images are structs as Hugging Face's Image feature has them."""
    names = row.get("image", [])
    structs = [
        {"bytes": {"red.png": RED, "blue.png": BLUE}[name], "path": name}
        for name in ([names] if isinstance(names, str) else names)
    ]
    images = {"images": structs} if listed else {"image": structs[0] if structs else None}
    return {key: value for key, value in row.items() if key != "image"} | images


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
