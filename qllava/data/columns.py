"""Reader of Parquet and Arrow files, a few records at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from qllava.data.keys import LEARNED, REFUSED, SPELLINGS, can_be_records
from qllava.data.problems import DAMAGE, OnProblem, Place, Problem, broken
from qllava.data.unpacked import bytes_or_path, is_image, unpack

Rows = Iterator[tuple[Place, Any]]

_KNOWN = {*LEARNED, *REFUSED, *chain(*SPELLINGS.values())}
_BATCH = 64  # records that are Python objects at one time; each may hold images
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def read_columns(path: Path, kind: str, on_problem: OnProblem) -> Rows:
    """Yield the records of a Parquet or Arrow file; corrupt data ends it with a problem."""
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
            yield Place(str(path), row=number), {key: _plain(key, value) for key, value in values.items()}


def _batches(path: Path, kind: str, on_problem: OnProblem) -> Iterator[list[dict[str, Any]]]:
    """Yield the records as Python objects, a few at a time; errors of pyarrow are not caught.

    Columns that have no meaning are loaded only if they may name or hold an image; the others become True.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pa.OSFile(str(path)) as source:  # not mapped: pages of a map count as memory of the process
        if kind == "Parquet file":
            # Neither ahead of time nor without a buffer: both would hold whole row groups. Threads end at a fork.
            file = pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
            schema = file.schema_arrow
            batches = file.iter_batches(_BATCH, columns=_wanted(schema), use_threads=False)
        elif kind == "Arrow file":
            reader = pa.ipc.open_file(source)
            schema, batches = reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = pa.ipc.open_stream(source)
            schema = batches.schema
        if not can_be_records(schema.names):
            problem = "the table needs one of the columns conversations, messages, question"
            on_problem(Problem("not an example", problem, "see the formats in docs/data.md", Place(str(path))))
            return
        wanted = _wanted(schema)
        others = {name: True for name in schema.names if name not in wanted}
        for batch in batches:
            batch = batch.select(wanted)
            batch.validate(full=True)  # Arrow trusts the offsets in a file: corrupt ones point anywhere in memory
            for start in range(0, batch.num_rows, _BATCH):
                yield [record | others for record in batch.slice(start, _BATCH).to_pylist()]
        if kind == "Arrow stream":
            source.seek(max(source.size() - len(END_OF_STREAM), 0))
            if source.read() != END_OF_STREAM:  # a stream truncated between two batches looks intact otherwise
                raise ValueError("the file is truncated (its end mark is missing)")


def _wanted(schema: Any) -> list[str]:
    """Return the columns to load: those that have a meaning, and others that hold text or bytes."""
    once = [field for field in schema if schema.names.count(field.name) == 1 or field.name in _KNOWN]
    return [field.name for field in once if field.name.strip().lower() in _KNOWN or _says_words(field.type)]


def _says_words(type: Any) -> bool:
    import pyarrow.types as kinds

    if kinds.is_dictionary(type):
        return _says_words(type.value_type)
    if kinds.is_nested(type):
        return any(_says_words(type.field(i).type) for i in range(type.num_fields))
    return any(
        is_one(type) for is_one in (kinds.is_string, kinds.is_large_string, kinds.is_binary, kinds.is_large_binary)
    )


def _plain(key: str, value: Any) -> Any:
    """Return a value as JSON would have it: images unpacked, keys with null removed.

    Columns give every object the keys that one of them has ({"type": "image", "text": None}). Bytes of an image, alone
    or in the {"bytes", "path"} of Hugging Face, become the path they were unpacked to; other bytes become True.
    """
    if isinstance(value, list):
        return [_plain(key, one) for one in value]
    value = bytes_or_path(value)
    if isinstance(value, dict):
        return {name: _plain(key, one) for name, one in value.items() if one is not None}
    if isinstance(value, bytes):
        return unpack(value) if key.strip().lower() in _KNOWN or is_image(value) else True
    return value
