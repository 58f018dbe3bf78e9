"""Check of a whole data set before training: its problems, the lengths of its samples, and what would be left out.

    file --records--> Place, example --formats--> Example --encode--> Sample --table--> samples.arrow
                                                                  images ----> every one decoded, once

Every example is read by the same code as in training, in several processes if there are many examples. The result is
kept in a folder whose name is a hash of the file's bytes and of everything that decides its samples, so the training
run and a second check reuse it. The state of the images is kept per image folder, so only new and changed images are
decoded, whatever was changed in the text.

Memory does not grow with the number of examples: samples are in an Arrow file, problems in a JSONL file next to it.
"""

from __future__ import annotations

import json
import os
import pickle
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from hashlib import blake2b, file_digest
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tokenizers
from datasets import Dataset
from tqdm import tqdm

from qllava.config import InputError, cache_folder
from qllava.data.decoded import at_their_examples, in_order, seen_in, uses_of
from qllava.data.encode import Encoder
from qllava.data.formats import Example, ImageFolder, folder_of, no_records, to_example
from qllava.data.problems import Place, Problem, RecordError
from qllava.data.records import read_records, record_files
from qllava.data.table import Layout, batch_of, open_table, quantiles, writing
from qllava.files import whole_folder
from qllava.workers import pool

_VERSION = 5
"""Version of the table; raise it whenever the same file would give a different table, so that old ones are unused."""
_ROWS = 1_000
_SAMPLES, _ROWS_BROKEN, _IMAGES_BROKEN = "samples.arrow", "rows.jsonl", "images.jsonl"
# The key of a folder does not cover the rest of the disk: an image that was missing may have been added.
_UNSETTLED = ("image missing", "file unreadable")
_ROWS_DONE = "rows.json"  # written last: a folder that has it is complete
_ALONE = 6
"""Number of chunks after which starting processes, which takes seconds, pays off."""

_MOST_KEYS, _OTHERS = 100, "\0"
"""Maximum number of keys that are reported one by one; a file whose keys are ids may have a million."""

_Row = tuple[Place, Any]
_Unread = dict[str, tuple[int, Place]]
"""For each key that is not read, the number of records that have it, and the place of the first."""


@dataclass(frozen=True)
class Summary:
    """Figures of a data file."""

    rows: int
    """Number of examples that could be read, usable or not."""
    samples: int
    """Number of samples to train on."""
    images: int
    """Number of distinct images of the samples."""
    shown: int
    """Number of images summed over the samples; divided by `images`, how many samples share an image."""
    tokens: dict[str, int]
    """Minimum, median, 95th percentile and maximum length of a sample in tokens, including image tokens."""
    learned_tokens: int
    """Number of learned tokens of all samples."""
    counts: dict[str, int]
    """Number of problems of each kind."""
    failing: int
    """Number of problems for which a check fails."""
    errors: int
    """Number of problems for which a run would fail."""


@dataclass(frozen=True)
class Checked:
    """A data file that was read to its end."""

    path: Path
    """The data file."""
    folder: Path
    """Folder of the results."""
    layout: Layout
    """Layout that unfolds the samples of the table."""
    summary: Summary
    """Figures of the file."""

    @property
    def table(self) -> Dataset:
        """The samples of the file, folded and memory-mapped."""
        return open_table(self.folder / _SAMPLES)

    def problems(self) -> Iterator[Problem]:
        """Yield the problems in the order of the examples; those of images come last."""
        return _problems(self.folder)


def check(
    path: Path,
    image_folder: Path | None,
    encoder: Encoder,
    *,
    images: bool = True,
    progress: bool = True,
    workers: int | None = None,
) -> Checked:
    """Read a data file to its end, and collect its problems instead of raising them (`Checked.problems`).

    Args:
        path: The file, or a folder that holds a data set.
        image_folder: The folder that image paths are relative to; None for that of the file.
        encoder: Encoder of the examples.
        images: Whether to decode every image once.
        progress: Whether to show a progress bar.
        workers: Number of processes that read a large file; None for one per core. The result is the same.

    Raises:
        InputError: The result cannot be written.
    """
    root = cache_folder() / "checked"
    folder = root / _key(path, image_folder, encoder)
    try:
        if not _is_settled(folder):
            with whole_folder(folder, _is_settled) as aside:
                reader = _Reader(encoder, ImageFolder(image_folder or folder_of(path)))
                _read(path, aside, reader, progress, workers or os.cpu_count() or 1)
        table = open_table(folder / _SAMPLES)
        folder_hash = blake2b(os.fsencode(image_folder or folder_of(path)), digest_size=8)
        known = root / f"images-{folder_hash.hexdigest()}.json"
        uses = uses_of(table)
        seen = seen_in(list(uses), known, progress) if images else []
        with (folder / _IMAGES_BROKEN).open("w", encoding="utf-8") as file:
            _write(file, at_their_examples(table, seen, uses))
    except OSError as error:
        raise InputError(
            f"The results of the check of {path} cannot be written to {root} ({error.strerror or error}); "
            "free disk space there, or set $QLLAVA_CACHE to another folder."
        ) from error
    layout = Layout(encoder.image_token_id)
    return Checked(path, folder, layout, _summary(folder, table, uses))


def _is_settled(folder: Path) -> bool:
    """Return whether the examples of a file were read into this folder, and would give the same result again."""
    try:
        return bool(json.loads((folder / _ROWS_DONE).read_text(encoding="utf-8"))["unsettled"] == 0)
    except (FileNotFoundError, ValueError):  # a machine that loses its power can leave the file empty
        return False


def _problems(folder: Path) -> Iterator[Problem]:
    for name in (_ROWS_BROKEN, _IMAGES_BROKEN):
        with (folder / name).open(encoding="utf-8") as file:
            for line in file:
                fields = json.loads(line)
                yield Problem(**{**fields, "place": Place(**fields["place"])})


def _key(path: Path, image_folder: Path | None, encoder: Encoder) -> str:
    """Return a hash of the file's bytes and of everything else that decides its samples, except the images."""
    core = encoder.tokenizer.backend_tokenizer.to_str()
    decides = (
        _VERSION, tokenizers.__version__,
        str(path.absolute()), str((image_folder or folder_of(path)).absolute()),
        blake2b(core.encode()).hexdigest(), encoder.tokenizer.bos_token, encoder.tokenizer.eos_token, encoder.template,
        encoder.image_token_id, encoder.image, encoder.max_length, encoder.positions, encoder.too_long,
    )  # fmt: skip
    digest = blake2b(repr(decides).encode(), digest_size=16)
    for file in record_files(path):
        try:
            if not file.is_file():
                raise FileNotFoundError
            with file.open("rb") as opened:
                digest.update(os.fsencode(file.name) + file_digest(opened, "blake2b").digest())
        except OSError:  # a Problem of `read_records`
            digest.update(b"unreadable")
    return digest.hexdigest()


# --- examples ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reader:
    """Reader of a chunk of examples into a piece of the table; it needs no other chunk, so it works in any process."""

    encoder: Encoder
    folder: ImageFolder

    def __call__(self, rows: list[_Row]) -> tuple[pa.RecordBatch, list[Problem], _Unread]:
        problems: list[Problem] = []
        examples = []
        for place, row in rows:
            try:
                examples.append(to_example(row, place, self.folder))
            except RecordError as error:
                problems.append(error.problem)
        samples = self.encoder.encode_all(examples, problems.append)
        by_place = {example.place: example for example in examples}
        chosen = [by_place[sample.place] for sample in samples]
        for example in chosen:
            if example.lost:
                problem, hint = "the conversation begins with an answer, which is not learned", "remove that turn"
                lost = Problem("leading answer", problem, hint, example.place, example.id, "warning")
                problems.append(lost)
        layout = Layout(self.encoder.image_token_id)
        problems.sort(key=lambda p: (p.place.line or 0, p.place.row or 0))
        return batch_of(chosen, samples, layout), problems, _unread(examples)


def _unread(examples: Sequence[Example]) -> _Unread:
    found: _Unread = {}
    for example in examples:
        _count(found, dict.fromkeys(example.unread, (1, example.place)))
    return found


def _count(found: _Unread, more: _Unread) -> None:
    """Add to the counts; keys beyond the maximum are counted together."""
    for key, (count, place) in more.items():
        name = key if key in found or len(found) < _MOST_KEYS else _OTHERS
        before, first = found.get(name, (0, place))
        found[name] = (before + count, first)


def _not_read(found: _Unread) -> Iterator[Problem]:
    """Yield a note for each key that is not read."""
    hint = "nothing to do, unless it should be learned"
    for key, (count, place) in found.items():
        records = f"{count:,} record{'' if count == 1 else 's'}"
        what = f"the key {key[:80]!r}" if key != _OTHERS else "other keys"
        problem = (
            f"{records} {'has' if count == 1 else 'have'} {what}, which {'are' if key == _OTHERS else 'is'} not read"
        )
        yield Problem("key not read", problem, hint, place, severity="note")


@cache
def _reader(path: Path) -> _Reader:
    """Return the reader in a worker process, where it is loaded once and not with every chunk."""
    reader: _Reader = pickle.loads(path.read_bytes())
    return reader


def _read_elsewhere(path: Path, rows: list[_Row]) -> tuple[pa.RecordBatch, list[Problem], _Unread]:
    return _reader(path)(rows)


def _chunks(rows: Iterator[_Row]) -> Iterator[list[_Row]]:
    while chunk := list(islice(rows, _ROWS)):
        yield chunk


def _pieces(
    reader: _Reader, chunks: Iterator[list[_Row]], aside: Path, workers: int
) -> Iterator[tuple[pa.RecordBatch, Any, Any]]:
    """Yield every chunk read, in order: the first ones in this process, further ones in `workers` processes, if > 1."""
    for chunk in islice(chunks, _ALONE if workers > 1 else None):
        yield reader(chunk)
    first = next(chunks, None)
    if first is None:
        return
    copy = aside / "reader.pickle"
    copy.write_bytes(pickle.dumps(reader))
    with pool(workers, start="spawn") as processes:
        yield from in_order(processes, partial(_read_elsewhere, copy), chain([first], chunks), ahead=workers + 1)
    copy.unlink()


def _read(path: Path, folder: Path, reader: _Reader, progress: bool, workers: int) -> None:
    """Read all examples into the table in `folder`, and their problems into the file next to it."""
    rows = unsettled = 0
    unread: list[Problem] = []
    keys: _Unread = {}
    with (
        writing(folder / _SAMPLES) as table,
        (folder / _ROWS_BROKEN).open("w", encoding="utf-8") as file,
        tqdm(desc=f"Reading {path.name}", unit=" examples", disable=not progress) as bar,
    ):

        def counted() -> Iterator[_Row]:
            nonlocal rows
            for row in read_records(path, unread.append):
                rows += 1
                yield row

        for batch, problems, unread_keys in _pieces(reader, _chunks(counted()), folder, workers):
            _count(keys, unread_keys)
            table.write_batch(batch)
            unsettled += _write(file, problems)
            bar.update(rows - bar.n)
        if not rows and not unread:
            unread.append(no_records(path).problem)
        unsettled += _write(file, chain(unread, _not_read(keys)))
    (folder / _ROWS_DONE).write_text(json.dumps({"rows": rows, "unsettled": unsettled}), encoding="utf-8")


def _write(file: Any, problems: Iterable[Problem]) -> int:
    """Write problems, one per line, and return how many of them may be solved at the next check without a new file."""
    unsettled = 0
    for problem in problems:
        file.write(json.dumps(asdict(problem)) + "\n")
        unsettled += problem.kind in _UNSETTLED
    return unsettled


# --- figures ----------------------------------------------------------------------------------------------------------


def numbers(table: Dataset, name: str) -> np.ndarray:
    """Return a column of numbers, (samples,); a column of lists is concatenated."""
    column = table.data.column(name)
    is_list = pa.types.is_list(column.type)
    # An empty column keeps its type too: uint64 hashes concatenated with an empty int64 column would become floats.
    parts = [np.empty(0, dtype=(column.type.value_type if is_list else column.type).to_pandas_dtype())]
    for chunk in column.chunks:
        flat = chunk.flatten() if is_list else chunk.fill_null(0)
        parts.append(flat.to_numpy(zero_copy_only=False))
    return np.concatenate(parts)


def lengths(checked: Checked) -> np.ndarray:
    """Return the number of tokens of every sample, (samples,)."""
    return numbers(checked.table, "length")


def _summary(folder: Path, table: Dataset, uses: dict[str, int]) -> Summary:
    counts: Counter[str] = Counter()
    severities: Counter[str] = Counter()
    for problem in _problems(folder):
        counts[problem.kind] += 1
        severities[problem.severity] += 1
    return Summary(
        rows=json.loads((folder / _ROWS_DONE).read_text(encoding="utf-8"))["rows"],
        samples=len(table),
        images=len(uses),
        shown=sum(uses.values()),
        tokens=quantiles(numbers(table, "length")),
        learned_tokens=int(numbers(table, "learned_tokens").sum()),
        counts=dict(counts),
        failing=severities["error"] + severities["warning"],
        errors=severities["error"],
    )
