"""Decoding of every image of a data set, to find images that are corrupt, of one colour, or equal.

The results are kept per image folder, so that only new and changed images are decoded.
"""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from PIL import Image
from tqdm import tqdm

from qllava.data.images import open_image
from qllava.data.problems import Place, Problem, RecordError
from qllava.data.table import lists
from qllava.files import write_whole

_AT_ONCE = 64
_SKETCH = (32, 32)
"""Rows and columns of pixels that are compared first: hashing all pixels would double the time of decoding."""


@dataclass(frozen=True)
class Seen:
    """Result of decoding an image."""

    name: str
    """Path of the image."""
    sketch: str = ""
    """Hash of the image's size and of some of its pixels; empty if it could not be decoded."""
    colour: str | None = None
    """Colour of all pixels if they have only one, else None."""
    pixels: str | None = None
    """Hash of the image's size and of all its pixels; only if another image has the same sketch."""
    problem: Problem | None = None
    """Reason why the image could not be decoded."""


def uses_of(table: Dataset) -> dict[str, int]:
    """Return every image of a table of samples, and how many samples show it."""
    chunks = table.data.column("image_files").chunks
    counts = pc.value_counts(pa.chunked_array([chunk.flatten() for chunk in chunks], pa.string()))
    return dict(zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True))


def seen_in(names: Sequence[str], known: Path, progress: bool) -> list[Seen]:
    """Decode every image that is new or has changed.

    Args:
        names: Paths of the images.
        known: File of earlier results, shared by all data files of an image folder.
        progress: Whether to show a progress bar.

    Returns:
        The result for each image, in the order of the names.
    """
    kept: dict[str, list[Any]] = {}
    with suppress(FileNotFoundError, ValueError):
        kept = json.loads(known.read_text(encoding="utf-8"))
    states = {name: _state(name) for name in names}
    seen = {name: Seen(name, *kept[name][2:]) for name in names if name in kept and kept[name][:2] == states[name]}
    changed = [name for name in names if name not in seen]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        with tqdm(total=len(changed), desc="Decoding images", disable=not progress or not changed) as bar:
            for one in in_order(pool, _decode, changed, ahead=_AT_ONCE):
                seen[one.name] = one
                bar.update()
        alike = Counter(one.sketch for one in seen.values() if one.problem is None and one.colour is None)
        twins = [name for name, one in seen.items() if alike[one.sketch] > 1 and one.pixels is None]
        for name, pixels in zip(twins, in_order(pool, _hash_of_all, twins, ahead=_AT_ONCE), strict=True):
            seen[name] = replace(seen[name], pixels=pixels)
    if changed or twins:
        for name, one in seen.items():
            state = states[name]
            if state is not None and one.problem is None:
                kept[name] = [*state, one.sketch, one.colour, one.pixels]
        write_whole(known, json.dumps(kept))
    return [seen[name] for name in names]


def _state(name: str) -> list[int] | None:
    """Return size and modification time of an image; if either changes, it must be decoded again."""
    try:
        found = Path(name).stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


_ABSENT = "check the name, and the folder that names are relative to (--image-folder; image_folder in a recipe)"
"""Hint for an image that a data file names and that is not found."""


def _decode(name: str) -> Seen:
    try:
        image = open_image(Path(name))
    except RecordError as error:
        return Seen(name, problem=error.problem if Path(name).exists() else replace(error.problem, hint=_ABSENT))
    some = image.resize(_SKETCH, Image.Resampling.NEAREST)
    colour = None
    if _is_flat(some) and _is_flat(image):
        colour = "#" + some.tobytes()[:3].hex()
    return Seen(name, _hash(image, some), colour)


def _is_flat(image: Image.Image) -> bool:
    ranges: Any = image.getextrema()
    return all(low == high for low, high in ranges)


def _hash_of_all(name: str) -> str | None:
    """Return a hash of all pixels; it takes as long as decoding, so it is used only if sketches are equal."""
    try:
        image = open_image(Path(name))
    except RecordError:  # removed meanwhile
        return None
    return _hash(image, image)


def _hash(image: Image.Image, shown: Image.Image) -> str:
    return blake2b(repr(image.size).encode() + shown.tobytes(), digest_size=12).hexdigest()


def at_their_examples(table: Dataset, seen: Sequence[Seen], uses: dict[str, int]) -> Iterator[Problem]:
    """Yield the problems of images, each at the first example that shows the image."""
    about = dict(_about(seen))
    missing = set(about)
    for index, names in enumerate(lists(table, "image_files")) if missing else ():
        for name in missing.intersection(names):
            missing.discard(name)
            row, problem = table[index], about[name]
            said = f"{name}: {problem.problem}" + (f" ({uses[name]} examples show it)" if uses[name] > 1 else "")
            yield replace(problem, problem=said, place=Place(row["file"], row["line"], row["row"]), id=row["id"])


def _about(seen: Sequence[Seen]) -> Iterator[tuple[str, Problem]]:
    """Yield an error for an image that cannot be decoded, and a note for one whose content may be unintended."""
    first: dict[str, str] = {}
    for one in seen:
        place = Place(one.name)
        if one.problem is not None:
            yield one.name, one.problem
        elif one.colour is not None:
            problem, hint = f"every pixel has the colour {one.colour}", "open the image: its content may be lost"
            yield one.name, Problem("one colour", problem, hint, place, severity="note")
        elif one.pixels is not None and first.setdefault(one.pixels, one.name) != one.name:
            problem = f"it is the same image as {first[one.pixels]}"
            hint = "if this is intended, use one of the two file names in all records"
            yield one.name, Problem("same image", problem, hint, place, severity="note")


def in_order(pool: Executor, work: Any, items: Iterable[Any], *, ahead: int) -> Iterator[Any]:
    """Yield the results of `pool.map`, but take only `ahead` items at a time: a large file would fill the memory."""
    waiting: deque[tuple[Any, Future[Any]]] = deque()

    def oldest() -> Any:
        item, future = waiting.popleft()
        try:
            return future.result()
        except RecursionError:  # an example that is nested as deeply as json reads it cannot be sent
            return work(item)

    for item in items:
        waiting.append((item, pool.submit(work, item)))
        if len(waiting) > ahead:
            yield oldest()
    while waiting:
        yield oldest()
