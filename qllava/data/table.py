"""Samples on disk, in an Arrow file that is memory-mapped, so that the size of a data set costs no memory.

The tokens of an image are stored as one, and learned tokens as pairs of positions [start, end); both are unfolded when
a row is read. For one image of 4 tokens:

    tokens     [10, <image>, 11, 12, 13]     learned  [3, 5]
    input_ids  [10, <image>, <image>, <image>, <image>, 11, 12, 13]
    labels     [-100, -100,  -100,    -100,    -100,  -100, 12, 13]

The number of tokens of each image is stored with the sample (`image_tokens`, here [4]).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from qllava.conversation import IMAGE_TOKEN, Conversation
from qllava.data.encode import IGNORE_INDEX, Sample
from qllava.data.formats import Example

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "tokens": pa.list_(pa.int32()),
        "learned": pa.list_(pa.int32()),
        "length": pa.int32(),  # of input_ids
        "learned_tokens": pa.int32(),
        "image_files": pa.list_(pa.string()),
        "image_tokens": pa.list_(pa.int32()),  # number of tokens of each image
        "file": pa.string(),
        "line": pa.int64(),
        "row": pa.int64(),
        # Hashes, so that samples are compared without decoding them: of the id; of the images; of images and
        # conversation; and for each learned answer, of images, question and answer.
        "id_hash": pa.uint64(),
        "images_hash": pa.uint64(),
        "content_hash": pa.uint64(),
        "round_hashes": pa.list_(pa.uint64()),
    }
)


@dataclass(frozen=True)
class Layout:
    """Transform of a table's `Dataset`, which unfolds its rows into samples for the collator."""

    image_token_id: int
    """Id of the `<image>` token."""

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Return rows as the collator takes them; no column is called image, or TRL would process the rows itself."""
        folded = zip(rows["tokens"], rows["learned"], rows["image_tokens"], strict=True)
        unfolded = [self.unfold(*row) for row in folded]
        return {
            "id": rows["id"],
            "input_ids": [ids for ids, _ in unfolded],
            "labels": [labels for _, labels in unfolded],
            "image_files": rows["image_files"],
            "image_tokens": rows["image_tokens"],
        }

    def unfold(
        self, tokens: Sequence[int], learned: Sequence[int], image_tokens: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Return ids and labels with every image token."""
        ids = np.asarray(tokens, dtype=np.int64)
        labels = np.full(len(ids), IGNORE_INDEX)
        for start, end in zip(learned[::2], learned[1::2], strict=True):
            labels[start:end] = ids[start:end]
        counts = np.ones(len(ids), dtype=np.int64)
        counts[ids == self.image_token_id] = image_tokens
        return np.repeat(ids, counts).tolist(), np.repeat(labels, counts).tolist()

    def fold(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and learned positions of a sample, in which each image is a single token."""
        ids, labels = np.asarray(sample.input_ids), np.asarray(sample.labels)
        kept = ids != self.image_token_id
        counts = np.asarray(sample.image_tokens, dtype=np.int64)
        kept[np.flatnonzero(~kept)[np.cumsum(counts) - counts]] = True  # the first token of each image
        learned = np.concatenate([[False], labels[kept] != IGNORE_INDEX, [False]])
        return ids[kept], np.flatnonzero(learned[1:] != learned[:-1])


def batch_of(examples: Sequence[Example], samples: Sequence[Sample], layout: Layout) -> pa.RecordBatch:
    """Return samples as a piece of a table; `examples` holds the example of each sample, in the same order."""
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for example, sample in zip(examples, samples, strict=True):
        tokens, learned = layout.fold(sample)
        images = [str(path) for path in sample.images]
        rounds = _rounds(example.conversation)
        shown = _hash(*images) if images else 0
        values = {
            "id": sample.id,
            "tokens": tokens.astype(np.int32),
            "learned": learned.astype(np.int32),
            "length": len(sample.input_ids),
            "learned_tokens": int((learned[1::2] - learned[::2]).sum()),
            "image_files": images,
            "image_tokens": list(sample.image_tokens),
            "file": sample.place.file,
            "line": sample.place.line,
            "row": sample.place.row,
            "id_hash": _hash(sample.id) if sample.id != sample.place.within else None,
            "images_hash": shown,
            "content_hash": _hash(str(shown), *(words for pair in rounds for words in pair)),
            "round_hashes": [
                _hash(str(shown), question, answer)
                for (question, answer), turn in zip(rounds, example.conversation.turns[1::2], strict=True)
                if turn.learned
            ],
        }
        for name, column in columns.items():
            column.append(values[name])
    return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)


def _rounds(conversation: Conversation) -> list[tuple[str, str]]:
    """Return pairs of question, without its `<image>`, and answer."""
    said = [turn.content.replace(IMAGE_TOKEN, "").strip() for turn in conversation.turns]
    return list(zip(said[::2], said[1::2], strict=True))


def _hash(*words: str) -> int:
    return int.from_bytes(blake2b("\0".join(words).encode(), digest_size=8).digest(), "little")


@contextmanager
def writing(path: Path) -> Iterator[pa.ipc.RecordBatchStreamWriter]:
    """Open a new table for writing with `write_batch`."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        yield writer


def open_table(path: Path) -> Dataset:
    """Open the rows of the file, memory-mapped; `with_transform(layout)` makes them samples for the trainer."""
    return Dataset.from_file(str(path))


def quantiles(sizes: np.ndarray) -> dict[str, int]:
    """Return minimum, median, 95th percentile and maximum of lengths; {} if there are none."""
    if not len(sizes):
        return {}
    at = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
    ordered = np.sort(sizes)
    return {name: int(ordered[round(share * (len(ordered) - 1))]) for name, share in at.items()}


def lists(table: Dataset, name: str) -> Iterator[list[Any]]:
    """Yield the values of a column of lists, row by row."""
    for chunk in table.data.column(name).chunks:
        yield from chunk.to_pylist()
