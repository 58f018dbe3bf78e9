"""Parquet and Arrow files -> records, a few at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qllava.data.problems import DAMAGE, OnProblem, Place, Problem, broken
from qllava.data.unpacked import unpack

Rows = Iterator[tuple[Place, Any]]

_TOLD_APART = ("conversations", "messages", "question")
_COLUMNS = (*_TOLD_APART, "answer", "image", "images", "id", "type")
_BATCH = 64  # rows that are Python objects at one time; each may hold pictures
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def read_columns(path: Path, kind: str, on_problem: OnProblem) -> Rows:
    """Yield the records of a Parquet or Arrow file; what is corrupt ends it with a problem."""
    import pyarrow as pa

    number = 0
    batches = _batches(path, kind, on_problem)
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, *DAMAGE) as error:
            on_problem(broken(kind, str(error), Place(str(path), row=number + 1)))
            return
        if batch is None:
            return
        for values in batch:
            number += 1
            yield from _row(values, Place(str(path), row=number), on_problem)


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
            source.seek(max(source.size() - len(END_OF_STREAM), 0))
            if source.read() != END_OF_STREAM:  # a stream that is cut between two batches looks sound otherwise
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
