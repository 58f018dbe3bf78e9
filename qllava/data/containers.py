"""Data files that are no JSON -> rows, one after the other: tables, Parquet, Arrow, tar, and folders of them.

    table      a header with the columns question and answer, and image (or picture, image_path, file_name), id, type
    Parquet    columns named as the keys of a JSON row
    Arrow      the same, as a file or as a stream (what `Dataset.save_to_disk` writes)
    tar        a WebDataset: NAME.json is the row, or NAME.txt a caption; NAME.jpg and others are its pictures

A row comes out as `formats.to_example` takes it. Pictures that a file holds itself are unpacked into the cache, once
for all rows that show them, and the row names them by a `Path`. A file is read piece by piece: its rows cost no memory.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, NamedTuple, TextIO

from qllava.config import InputError, cache_folder
from qllava.conversation import ask
from qllava.data.rows import OnProblem, Place, Problem

Rows = Iterator[tuple[Place, Any]]

_FORMATS = "a data file is a JSON list of rows, one row per line, a table (CSV), Parquet, Arrow or a WebDataset tar"
_TOLD_APART = ("conversations", "messages", "question")
_COLUMNS = (*_TOLD_APART, "answer", "image", "images", "id", "type")
_TABLE = {name: name for name in ("question", "answer", "image", "id", "type")} | dict.fromkeys(
    ("picture", "image_path", "file_name"), "image"
)
_BATCH = 64  # rows that are Python objects at one time; each may hold pictures
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"PK\3\4": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}
_MAGIC = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"BM": ".bmp", b"II*": ".tif", b"MM\0": ".tif"}
_PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
_SHARDS = {".parquet": "Parquet", ".arrow": "Arrow", ".tar": "tar"}
# What pyarrow and tarfile raise at broken bytes beside their own: wrong places, numbers and texts have been followed.
_DAMAGE = (OSError, ValueError, LookupError, OverflowError, MemoryError, RecursionError)
_SPLITS = {"train", "test", "validation", "valid", "val", "dev"}


def unpack(data: bytes) -> Path:
    """Write the bytes of a picture into the cache, where they are not there yet; the same bytes are the same file.

    Returns its absolute path. Processes may do so at the same time. Raises InputError when the cache cannot be written.
    """
    name = hashlib.sha256(data).hexdigest()[:32]
    suffix = next((s for magic, s in _MAGIC.items() if data.startswith(magic)), ".bin")
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        suffix = ".webp"
    folder = cache_folder().absolute() / "pictures" / name[:2]
    path = folder / f"{name}{suffix}"
    aside = folder / f".{name}-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        # The size is looked at because a machine that loses its power can leave a file of this name empty.
        if path.is_file() and path.stat().st_size == len(data):
            return path
        folder.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_bytes(data)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder.parent}: the pictures of the data file cannot be unpacked here ({error.strerror}); "
            "make room, or set QLLAVA_CACHE to another folder."
        ) from error
    return path


def read_csv(file: TextIO, path: Path, on_problem: OnProblem) -> Rows:
    """The rows of a table; `file` stands at its beginning. A record that cannot be read is left out."""
    header, skipped = "", 0
    for header in file:
        skipped += 1
        if header.strip():
            break
    delimiter, columns = _header(header)
    names = [column for column in columns if column is not None]
    if not {"question", "answer"} <= set(names):
        problem = "the file is neither JSON nor a table with the columns question and answer"
        on_problem(Problem("not a data file", problem, _FORMATS, Place(str(path))))
        return
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        problem = f"the header names the {twice} {names.count(twice)} times"
        on_problem(Problem("table", problem, "keep one of these columns", Place(str(path), line=skipped)))
        return
    reader = csv.reader(file, delimiter=delimiter, strict=True, skipinitialspace=True)
    while True:
        place = Place(str(path), line=skipped + reader.line_num + 1)
        try:
            record = next(reader, None)
        except csv.Error as error:
            hint = "close every quote, and double the quotes inside a quoted field"
            on_problem(Problem("table", f"the record cannot be read ({error})", hint, place))
            continue
        if record is None:
            return
        if any("\0" in field for field in record):
            on_problem(Problem("table", "the record holds a NUL character", "write it again", place))
        elif len(record) == len(columns):
            yield place, _record(columns, record)
        elif record:  # a blank line is no record
            problem = f"the number of fields is {len(record)}, of columns {len(columns)}"
            hint = f"quote fields that hold {delimiter!r} or a line break"
            on_problem(Problem("table", problem, hint, place))


def _header(line: str) -> tuple[str, list[str | None]]:
    """Delimiter of a table, and what each of its columns is for (None: nothing); no columns where it is no header."""
    for delimiter in ",;\t":
        try:
            fields = next(csv.reader([line], delimiter=delimiter, strict=True, skipinitialspace=True), [])
        except csv.Error:
            continue
        columns = [_TABLE.get(field.strip().lower()) for field in fields]
        if "question" in columns and "answer" in columns:
            return delimiter, columns
    return ",", []


def _record(columns: list[str | None], record: list[str]) -> dict[str, str]:
    # An empty cell of image, id or type says nothing; of the others, that words are missing.
    cells = [(column, field) for column, field in zip(columns, record, strict=True) if column is not None]
    row = {column: field for column, field in cells if field.strip() or column in ("question", "answer")}
    return row | {"image": row["image"].strip()} if "image" in row else row


def read_container(path: Path, head: bytes, on_problem: OnProblem) -> Rows:
    """The rows of a binary file, recognized by its first 512 bytes. What is broken ends it with a problem."""
    if head.startswith(b"PAR1"):
        yield from _read_columns(path, "Parquet file", on_problem)
    elif head.startswith((b"ARROW1", _END_OF_STREAM[:4])):
        yield from _read_columns(path, "Arrow file" if head.startswith(b"ARROW1") else "Arrow stream", on_problem)
    elif head[257:262] == b"ustar":
        yield from _read_tar(path, on_problem)
    else:
        packed = next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)
        problem = f"the file is compressed ({packed})" if packed else "the file is neither text nor Parquet, Arrow, tar"
        hint = f"unpack it first: {_FORMATS}" if packed else _FORMATS
        on_problem(Problem("not a data file", problem, hint, Place(str(path))))


def read_folder(path: Path, on_problem: OnProblem) -> Rows:
    """The rows of a saved Hugging Face dataset, or of a folder of Parquet, Arrow or tar files, by name."""
    for shard in _shards(path, on_problem):
        try:
            with shard.open("rb") as file:
                head = file.read(512)
        except (OSError, ValueError) as error:  # ValueError: state.json can spell names that no file may have
            problem = f"the data file cannot be read ({error.strerror if isinstance(error, OSError) else error})"
            on_problem(Problem("file unreadable", problem, "check the folder it lies in", Place(str(shard))))
        else:
            yield from read_container(shard, head, on_problem)


def _shards(path: Path, on_problem: OnProblem) -> list[Path]:
    here = Place(str(path))
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(folder.parent.name for folder in path.glob("*/state.json"))) or "none"
        problem = f"the folder holds several datasets ({splits})"
        on_problem(Problem("splits", problem, "name the folder of one of them", here))
        return []
    if (path / "state.json").is_file():
        # It names the files; others lie there too: what `map` caches, and shards of an older, longer version.
        try:
            state = json.loads((path / "state.json").read_bytes())
            return [path / PurePath(file["filename"]).name for file in state["_data_files"]]
        except (ValueError, LookupError, TypeError, RecursionError):
            problem = "this does not name the files of a saved dataset"
            on_problem(Problem("not a data file", problem, "save it again", Place(str(path / "state.json"))))
            return []
    inside = [file for folder in (path, path / "data") if folder.is_dir() for file in folder.iterdir()]
    found = sorted(file for file in inside if file.suffix in _SHARDS and not file.is_dir())
    kinds = [name for suffix, name in _SHARDS.items() if any(file.suffix == suffix for file in found)]
    splits = ", ".join(sorted({re.split("[^a-z]", file.name)[0] for file in found} & _SPLITS))
    if not found:
        problem = "this is a folder without data files"
        hint = f"name a file, or a folder of Parquet, Arrow or tar files: {_FORMATS}"
        on_problem(Problem("not a data file", problem, hint, here))
    elif len(kinds) > 1:
        problem = f"the folder holds files of several kinds ({', '.join(kinds)})"
        on_problem(Problem("not a data file", problem, "keep one kind in it, or name one file", here))
    elif "," in splits:
        problem = f"the folder holds the files of several datasets ({splits})"
        on_problem(Problem("splits", problem, "give each a folder of its own", here))
    else:
        return found
    return []


def _read_columns(path: Path, kind: str, on_problem: OnProblem) -> Rows:
    import pyarrow as pa

    number = 0
    batches = _batches(path, kind, on_problem)
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, *_DAMAGE) as error:
            on_problem(_broken(kind, str(error), Place(str(path), row=number + 1)))
            return
        if batch is None:
            return
        for values in batch:
            number += 1
            yield from _row(values, Place(str(path), row=number), on_problem)


def _broken(kind: str, reason: str, place: Place) -> Problem:
    short = " ".join(reason.split())[:200].rstrip(".") or "not enough memory"  # the reason of a MemoryError is empty
    problem = f"from here on the {kind} cannot be read ({short})"
    return Problem("file broken", problem, "download it or write it again", place)


def _batches(path: Path, kind: str, on_problem: OnProblem) -> Iterator[list[dict[str, Any]]]:
    """The columns that concern us, as Python objects, a few rows at a time; raises what pyarrow does."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pa.OSFile(str(path)) as source:  # not mapped: pages of a map count as memory of the process
        if kind == "Parquet file":
            # Neither ahead of time nor without a buffer: both would hold whole row groups. Threads end at a fork.
            file = pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
            names = file.schema_arrow.names
            wanted = [name for name in _COLUMNS if name in names]
            batches = file.iter_batches(_BATCH, columns=wanted, use_threads=False)
        elif kind == "Arrow file":
            reader = pa.ipc.open_file(source)
            names, batches = reader.schema.names, (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = pa.ipc.open_stream(source)
            names = batches.schema.names
        if not set(names) & set(_TOLD_APART):
            problem = f"the table has none of the columns {', '.join(_TOLD_APART)}"
            on_problem(Problem("not a row", problem, "see the formats in docs/data.md", Place(str(path))))
            return
        for batch in batches:
            batch = batch.select([name for name in _COLUMNS if name in names])
            batch.validate(full=True)  # Arrow trusts offsets that it has read: broken ones lead anywhere in memory
            for start in range(0, batch.num_rows, _BATCH):
                yield batch.slice(start, _BATCH).to_pylist()
        if kind == "Arrow stream":
            source.seek(max(source.size() - len(_END_OF_STREAM), 0))
            if source.read() != _END_OF_STREAM:  # a stream that is cut between two batches looks sound otherwise
                raise ValueError("it ends without its end mark")


def _row(row: dict[str, Any], place: Place, on_problem: OnProblem) -> Rows:
    """A row of columns as a row of JSON; nothing, and a problem, where a text in it should be JSON and is not."""
    for key in ("image", "images"):
        if key in row:
            row[key] = _pictures(row[key])
    for key in ("conversations", "messages"):
        said = row.get(key)
        if isinstance(said, str) and said.lstrip().startswith("["):
            try:
                said = json.loads(said)
            except (ValueError, RecursionError):
                id = None if row.get("id") is None else str(row["id"])
                problem = f"the text under {key} begins with [ and is not valid JSON"
                on_problem(Problem("not JSON", problem, "write it as JSON", place, id))
                return
        if key in row:
            row[key] = _without_nulls(said)
    yield place, row


def _pictures(value: Any) -> Any:
    """What stands for pictures: bytes are unpacked, alone or in the {"bytes", "path"} of Hugging Face."""
    if isinstance(value, list):
        return [_pictures(one) for one in value]
    if isinstance(value, dict) and value and value.keys() <= {"bytes", "path"}:
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    return unpack(value) if isinstance(value, bytes) else value


def _without_nulls(value: Any) -> Any:
    """Without the keys that columns give to every object because one has them ({"type": "image", "text": None})."""
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return value


class _Member(NamedTuple):
    """A file in a tar: NAME.PART.jpg has the key NAME, a part that may be a number, and the suffix .jpg.

    data: its bytes; None where the tar does not hold them as such (a link, or a sparse file of any size).
    """

    key: str
    part: str
    suffix: str
    data: bytes | None


class _Broken(Exception):
    """The tar cannot be read on."""


def _read_tar(path: Path, on_problem: OnProblem) -> Rows:
    number = 0
    try:
        for key, members in groupby(_members(path), key=lambda member: member.key):
            number += 1
            yield from _sample(key, list(members), Place(str(path), row=number), on_problem)
    except _Broken as error:  # the sample that was being read may lack a part, so it is not used
        on_problem(_broken("tar", str(error), Place(str(path), row=max(number, 1))))


def _members(path: Path) -> Iterator[_Member]:
    """The files of a tar that belong to samples, with their bytes; nothing is written by the names that it gives."""
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in _headers(tar, size):
                    name = PurePosixPath(member.name)
                    first, *parts = name.name.split(".")
                    suffix = name.suffix.lower()
                    # A name that begins with a dot is no sample: systems pack such files beside the real ones.
                    if not first or suffix not in {*_PICTURES, ".json", ".txt"}:
                        continue
                    plain = member.isreg() and not member.issparse()
                    opened = tar.extractfile(member) if plain else None
                    data = None if opened is None else opened.read()
                    yield _Member(str(name.with_name(first)), ".".join(parts[:-1]), suffix, data)
                # A damaged header is the end to tarfile, and so is the end of the first of two tars that were joined.
                if tar.offset >= size:
                    raise _Broken("it is cut off")
                file.seek(tar.offset)
                if any(piece.strip(b"\0") for piece in iter(lambda: file.read(1 << 20), b"")):
                    raise _Broken("a header is damaged or cut off, or another tar was appended")
        except (tarfile.TarError, *_DAMAGE) as error:
            raise _Broken(str(error)) from None


def _headers(tar: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo]:
    """The members of a tar of `size` bytes, folders excepted; _Broken where one reaches beyond it, or backwards."""
    end = -1
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile would remember them all
        if member.size < 0 or tar.offset <= end:
            raise _Broken("a member has a negative size")
        end = tar.offset
        if member.isreg() and not member.issparse() and member.offset_data + member.size > size:
            raise _Broken("it is cut off")
        if not member.isdir():
            yield member


def _sample(key: str, members: list[_Member], place: Place, on_problem: OnProblem) -> Rows:
    """The row of one sample; nothing, and a problem, where it has none."""

    def report(problem: str, hint: str) -> None:
        on_problem(Problem("sample", problem, hint, place, key))

    files = [(member.suffix, member.part, member.data) for member in members if member.data is not None]
    if len(files) < len(members):
        return report("the sample holds a link, or a sparse file", "pack the file itself")
    rows, captions = ([data for suffix, _, data in files if suffix == wanted] for wanted in (".json", ".txt"))
    pictures = [(part, data) for suffix, part, data in files if suffix in _PICTURES]
    if all(re.fullmatch("[0-9]{1,9}", part) for part, _ in pictures):  # else in the order of the tar
        pictures.sort(key=lambda picture: int(picture[0]))
    if len(rows) > 1 or len(captions) > 1:
        return report("the sample has several .json or .txt files", "keep one of each")
    if not rows and not captions:
        problem = "the sample has neither a .json that holds its row nor a .txt that holds its caption"
        return report(problem, "pack one of them directly beside its pictures")
    try:
        row = json.loads(rows[0]) if rows else {}
        caption = captions[0].decode("utf-8-sig").strip() if captions else ""
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]
        what = "caption" if isinstance(error, UnicodeDecodeError) and not rows else ".json"
        return report(f"the sample's {what} cannot be read ({reason})", "write a row as JSON, all text in UTF-8")
    if not isinstance(row, dict):
        yield place, row  # `formats` says what is wrong with it
        return
    row = {"id": key} | {name: value for name, value in row.items() if name != "id" or value is not None}
    if captions and not set(_TOLD_APART) & row.keys():  # a .json beside a caption may tell other things of the picture
        if not pictures:
            return report("the sample has a caption and no picture", "pack it directly beside its picture")
        question = {"from": "human", "value": ask("", len(pictures))}
        row = {"id": row["id"], "conversations": [question, {"from": "gpt", "value": caption}]}
    if pictures:
        row.pop("image", None)
        row["images"] = [unpack(data) for _, data in pictures]
    yield place, row
