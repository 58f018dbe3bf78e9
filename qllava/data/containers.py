"""Reader of binary data files and folders: Parquet, Arrow, WebDataset tars, recognized by their first bytes.

    Parquet    columns named as the keys of a JSON record
    Arrow      the same, as a file or as a stream (what `Dataset.save_to_disk` writes)
    tar        a WebDataset: NAME.json is the record, or NAME.txt a caption; NAME.jpg and others are its images

Records are in the form that `formats.to_example` takes. Images embedded in a file are unpacked into the cache, once for
all records that show them, and the record names them by a `Path`. A file is read piece by piece, so its size costs no
memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from qllava.data.columns import END_OF_STREAM, read_columns
from qllava.data.problems import FORMATS, OnProblem, Place, Problem
from qllava.data.webdataset import read_tar

Records = Iterator[tuple[Place, Any]]

_COMPRESSED = {b"\x1f\x8b": "gzip", b"PK\3\4": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}
_SHARDS = {".parquet": "Parquet", ".arrow": "Arrow", ".tar": "tar"}
_SPLITS = {"train", "test", "validation", "valid", "val", "dev"}


def read_container(path: Path, head: bytes, on_problem: OnProblem) -> Records:
    """Yield the records of a binary file, whose kind is known by its first 512 bytes; corrupt data ends it."""
    if head.startswith(b"PAR1"):
        yield from read_columns(path, "Parquet file", on_problem)
    elif head.startswith((b"ARROW1", END_OF_STREAM[:4])):
        yield from read_columns(path, "Arrow file" if head.startswith(b"ARROW1") else "Arrow stream", on_problem)
    elif head[257:262] == b"ustar":
        yield from read_tar(path, on_problem)
    else:
        packed = next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)
        problem = f"the file is compressed ({packed})" if packed else "the file is neither text nor Parquet, Arrow, tar"
        hint = f"unpack it first: {FORMATS}" if packed else FORMATS
        on_problem(Problem("not a data file", problem, hint, Place(str(path))))


def read_folder(path: Path, on_problem: OnProblem) -> Records:
    """Yield the records of a saved Hugging Face dataset, or of the Parquet, Arrow or tar files in a folder, by name."""
    for shard in _shards(path, on_problem):
        try:
            with shard.open("rb") as file:
                head = file.read(512)
        except (OSError, ValueError) as error:  # ValueError: state.json can contain names that no file may have
            problem = f"the data file cannot be read ({error.strerror if isinstance(error, OSError) else error})"
            on_problem(Problem("file unreadable", problem, "check its folder", Place(str(shard))))
        else:
            yield from read_container(shard, head, on_problem)


def _shards(path: Path, on_problem: OnProblem) -> list[Path]:
    here = Place(str(path))
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(folder.parent.name for folder in path.glob("*/state.json"))) or "none"
        problem = f"the folder contains several datasets ({splits})"
        on_problem(Problem("splits", problem, "name the folder of one of them", here))
        return []
    if (path / "state.json").is_file():
        # It names the files; others may be there too: what `map` caches, and shards of an older, longer version.
        try:
            state = json.loads((path / "state.json").read_bytes())
            return [path / PurePath(file["filename"]).name for file in state["_data_files"]]
        except (ValueError, LookupError, TypeError, RecursionError):
            problem = "this file does not list the data files of a saved dataset"
            on_problem(Problem("not a data file", problem, "save it again", Place(str(path / "state.json"))))
            return []
    inside = [file for folder in (path, path / "data") if folder.is_dir() for file in folder.iterdir()]
    found = sorted(file for file in inside if file.suffix in _SHARDS and not file.is_dir())
    kinds = [name for suffix, name in _SHARDS.items() if any(file.suffix == suffix for file in found)]
    splits = ", ".join(sorted({re.split("[^a-z]", file.name)[0] for file in found} & _SPLITS))
    if not found:
        problem = "this is a folder without data files"
        hint = f"name a file, or a folder of Parquet, Arrow or tar files: {FORMATS}"
        on_problem(Problem("not a data file", problem, hint, here))
    elif len(kinds) > 1:
        problem = f"the folder contains files of several kinds ({', '.join(kinds)})"
        on_problem(Problem("not a data file", problem, "keep one kind in it, or name one file", here))
    elif "," in splits:
        problem = f"the folder contains the files of several datasets ({splits})"
        on_problem(Problem("splits", problem, "give each a folder of its own", here))
    else:
        return found
    return []
