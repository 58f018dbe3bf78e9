"""`qllava filter`: select a balanced part of a file of captions, and report the effect.

An example has LLaVA's format, with its caption as the last answer, or has its caption under `caption`:

    {"id": "1", "image": "1.jpg", "conversations": [{"from": "human", ...}, {"from": "gpt", "value": "A red bus."}]}
    {"id": "1", "image": "1.jpg", "caption": "A red bus."}

in a JSON list, or one per line. The file is read twice, once for its phrases and once for its examples, so that only
numbers and each distinct phrase are kept in memory, and no example. Neither images nor torch are needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from qllava.config import InputError
from qllava.data.formats import no_records
from qllava.data.problems import Place, Problem, RecordError, Unusable, check_unicode
from qllava.data.records import read_records, record_files
from qllava.files import whole_file
from qllava.page import write_page
from qllava.synthesis.balance import Balance, Settings, balance_of, html
from qllava.synthesis.concepts import index_phrases, select
from qllava.synthesis.phrases import chunker

_FORM = 'an example is {"id", "image", "caption"}, or LLaVA\'s with conversations'


def filter_captions(
    captions: Path,
    out: Path,
    *,
    min_count: int = 3,
    max_per_concept: int = 100,
    seed: int = 0,
    concepts: Literal["spacy", "simple"] | None = None,
    page: Path | None = None,
) -> Balance:
    """Write the examples that `concepts.select` keeps, unchanged and in their order, and return the figures.

    Args:
        captions: File of the examples.
        out: File for the examples that are kept, a JSON list.
        min_count: Smallest number of captions of a concept that is not ignored.
        max_per_concept: Number of captions drawn for a frequent concept.
        seed: Seed of the draws.
        concepts: Method of finding phrases; None for spaCy if it and its model are installed.
        page: File for the figures as HTML.

    Raises:
        InputError: A file or example cannot be read, the file changes meanwhile, or a file cannot be written; `out` is
            then unchanged, or complete.
    """
    _check_places(captions, out, page)
    found = chunker(concepts)
    before = _stamps(captions)
    index = index_phrases(found.phrases(_read_captions(captions)))
    if not index.captions:
        raise no_records(captions)
    kept = select(index, min_count=min_count, max_per_concept=max_per_concept, seed=seed)
    figures = balance_of(index, kept, Settings(found.name, found.about, min_count, max_per_concept, seed))
    _write_records(captions, out, kept, before)
    if page is not None:
        try:
            write_page(page, html(figures, captions.name))
        except OSError as error:
            raise InputError(f"{page} cannot be written ({error.strerror}); choose another path.") from error
    return figures


def caption_of(record: Any, place: Place) -> str:
    """Return the caption of an example.

    Raises:
        RecordError: The record has no caption, or more than one key for it.
    """
    id = record.get("id") if isinstance(record, dict) else None
    said = str(id) if isinstance(id, str | int) else None

    def wrong(kind: str, problem: str, hint: str) -> RecordError:
        return RecordError(Problem(kind, problem, hint, place, said))

    if not isinstance(record, dict):
        raise wrong("not an example", "an example must be a JSON object", _FORM)
    if any(isinstance(name, Path) for key in ("image", "images") for name in _listed(record.get(key))):
        raise wrong(
            "images inside", "the images are inside the data file", "save the images as files and give their names"
        )
    keys = [key for key in ("caption", "conversations") if record.get(key) is not None]
    if len(keys) != 1:
        had = "both" if keys else "neither"
        raise wrong(
            "not an example", f"an example has one of the keys caption and conversations, this one has {had}", _FORM
        )
    caption = record[keys[0]]
    if keys == ["conversations"]:
        last = caption[-1] if isinstance(caption, list) and caption else None
        if not isinstance(last, dict) or last.get("from") not in ("gpt", "assistant"):
            raise wrong("turns", "the conversation does not end with an answer of gpt", "the caption belongs there")
        caption = last.get("value")
    if not isinstance(caption, str):
        raise wrong("no text", "the caption is not text", "write it as text, or drop the example")
    try:
        check_unicode(caption, "the caption")
    except Unusable as error:
        raise wrong(error.kind, error.problem, error.hint) from None
    return caption


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _read_captions(path: Path) -> Iterator[str]:
    for place, record in tqdm(read_records(path), desc="captions", unit=" captions", unit_scale=True, disable=None):
        yield caption_of(record, place)


def _write_records(captions: Path, out: Path, kept: NDArray[np.bool_], before: list[tuple[int, int]]) -> None:
    """Write the examples that are kept, all of them or none."""
    records = tqdm(
        read_records(captions), desc="examples", total=len(kept), unit=" examples", unit_scale=True, disable=None
    )
    separator = "\n"
    try:
        with whole_file(out) as aside:
            with aside.open("w", encoding="utf-8") as file:
                file.write("[")
                # Not strict: if the file changed meanwhile, the comparison of the stamps below reports it clearly.
                for (_, record), keep in zip(records, kept.tolist(), strict=False):
                    if keep:
                        # ASCII, because other fields may contain lone surrogates, which UTF-8 cannot encode.
                        file.write(separator + json.dumps(record))
                        separator = ",\n"
                file.write("\n]\n")
            if _stamps(captions) != before:
                raise InputError(f"{captions} changed while qllava was reading it; run the command again.")
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}); choose another path.") from error


def _stamps(path: Path) -> list[tuple[int, int]]:
    """Return size and time of change of each data file; empty if a file is missing, which `read_records` reports."""
    try:
        return [(file.stat().st_size, file.stat().st_mtime_ns) for file in record_files(path)]
    except OSError:
        return []


def _check_places(captions: Path, out: Path, page: Path | None) -> None:
    """Raise an error before the long work if an output file cannot be written."""
    for path in (out, page):
        if path is None:
            continue
        if path.is_dir():
            raise InputError(f"{path} is a folder; name a file to write.")
        if not path.parent.is_dir():
            raise InputError(f"{path} cannot be written: the folder {path.parent} does not exist. Create it first.")
        if path.exists() and captions.exists() and path.samefile(captions):
            raise InputError(f"{path} is also the file of captions that is read; give another output file.")
    if page is not None and page.absolute() == out.absolute():
        raise InputError(
            f"{out} is given both for the examples (OUT) and for the page (--html); give two different files."
        )
