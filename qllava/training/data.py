"""The data of a run: a file or a mixture of files, checked before training, then read from the disk.

A mixture is written in the recipe's YAML:

    train_file:
      - {path: instruct.json, image_folder: coco/train2017}
      - {path: digits.jsonl, repeat: 3}        # three times per epoch; 0.5 is every second example, drawn with the seed

With `weight` instead of `repeat`, weights are the files' shares of an epoch: the file that is largest relative to its
share is read once, and the others are repeated to match the shares, so that no example is left out.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from qllava.config import InputError
from qllava.conversation import Template
from qllava.data.check import Checked, check, lengths, numbers
from qllava.data.encode import Encoder
from qllava.data.records import record_files
from qllava.data.verdict import Verdict
from qllava.image_layout import ImageLayout
from qllava.models.assemble import Assembled
from qllava.models.positions import positions_of
from qllava.training.durable import processes
from qllava.training.settings import Settings


@dataclass(frozen=True)
class Part:
    """One file of a data set."""

    path: Path
    """The file, or a folder that contains a data set."""
    image_folder: Path | None
    """Folder that image paths are relative to; None for the folder of the file."""
    repeat: float = 1.0
    """How often each example occurs in an epoch."""
    weight: float | None = None
    """Share of an epoch, relative to the weights of the other files; replaces `repeat`."""


@dataclass(frozen=True)
class Prepared:
    """Samples that are ready for training."""

    dataset: Dataset
    """`id`, `input_ids`, `labels` and `images` of every sample of an epoch; memory-mapped."""
    parts: Sequence[Checked]
    """The files of the samples."""
    lengths: np.ndarray
    """Tokens of each sample of an epoch."""
    learned: int
    """Number of learned tokens of all samples together."""
    images: np.ndarray
    """Hash of the images of each sample; 0 for none."""

    def count(self, kind: str) -> int:
        """Return the number of problems of a kind in all files, such as "dropped" or "trimmed"."""
        return sum(part.summary.counts.get(kind, 0) for part in self.parts)


def parts_of(given: Any, image_folder: Path | None, field: str) -> list[Part]:
    """Return the files of a setting, a path or the list of a mixture; raise an InputError for anything else."""
    if isinstance(given, str | Path):
        return [Part(Path(given), image_folder)]
    if not isinstance(given, list) or not given:
        raise InputError(f"The setting {field} is {given!r}. Give a file, or a list of {{path, repeat or weight}}.")
    parts = [_part(entry, number, image_folder, field) for number, entry in enumerate(given, start=1)]
    if len({part.weight is None for part in parts}) > 1:
        raise InputError(
            f"The setting {field} has a weight for some files only. Give a weight for every file, or for none."
        )
    return parts


def _part(entry: Any, number: int, image_folder: Path | None, field: str) -> Part:
    where = f"The setting {field}, file {number}"
    if isinstance(entry, str):
        return Part(Path(entry), image_folder)
    known = ("path", "image_folder", "repeat", "weight")
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise InputError(f"{where}: give a file, or {{path: FILE}} with {', '.join(known[1:])}.")
    if unknown := [str(key) for key in entry if key not in known]:
        raise InputError(f"{where} has the unknown key {unknown[0]!r}. Known keys: {', '.join(known)}.")
    if "repeat" in entry and "weight" in entry:
        raise InputError(f"{where} has both repeat and weight. Keep one of them.")
    for key in ("repeat", "weight"):
        value = entry.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise InputError(f"{where}: {key} is {value!r}. Give a number above 0.")
    folder = entry.get("image_folder")
    if folder is not None and not isinstance(folder, str):
        raise InputError(f"{where}: image_folder is {folder!r}. Give a folder.")
    own = Path(folder) if folder else image_folder
    return Part(Path(entry["path"]), own, float(entry.get("repeat", 1)), entry.get("weight"))


def hashes_of(parts: list[Part]) -> list[dict[str, str]]:
    """Return name and SHA-256 of each file of examples; for a folder, of the files in it that contain examples."""
    hashes = []
    for file in (file for part in parts for file in record_files(part.path)):
        with file.open("rb") as opened:
            hashes.append({"file": file.name, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()})
    return hashes


def prepare(
    parts: Sequence[Part],
    encoder: Encoder,
    *,
    seed: int,
    evaluation: Sequence[Part] = (),
    skip_check: bool = False,
    workers: int | None = None,
) -> tuple[Prepared, Prepared | None]:
    """Check the files, print the findings, and open the samples for training and the held-out ones.

    If several examples cannot be used, they are printed before the error.

    Args:
        parts: The training files.
        encoder: Makes samples of the examples.
        seed: Draws the examples of a file that is repeated a fractional number of times.
        evaluation: The held-out files.
        skip_check: Do not open the images, and do not compare examples.
        workers: Processes that encode a large file; None for one per core.

    Raises:
        InputError: An example cannot be used, or no example is left.
    """

    def checked_parts(some: Sequence[Part]) -> list[Checked]:
        return [check(p.path, p.image_folder, encoder, images=not skip_check, workers=workers) for p in some]

    checked, held_out = checked_parts(parts), checked_parts(evaluation)
    verdict = Verdict(checked, held_out, ()) if skip_check else Verdict.over(checked, held_out)
    if skip_check:
        print("The data is NOT CHECKED (skip_check). An unreadable image will end the run when its batch is loaded.")
    if verdict.errors:
        if verdict.errors > 1:  # a single one is in the error itself
            print(verdict.text(verbose=False), file=sys.stderr)
        first = next(problem for problem in verdict.problems() if problem.severity == "error")
        more = f" There are {verdict.errors - 1:,} more such problems; `qllava check` lists them all."
        raise InputError(f"{first}{more if verdict.errors > 1 else ''}")
    print(verdict.text(verbose=False))
    if not any(part.summary.samples for part in checked):
        rows = sum(part.summary.rows for part in checked)
        raise InputError(
            f"No sample is left to train on: all {rows} are longer than max_length or than the model's context."
        )
    trained = _open(checked, [p.repeat for p in parts], [p.weight for p in parts], seed)
    return trained, _open(held_out, [1.0] * len(held_out), [None] * len(held_out), seed) if held_out else None


def prepare_for(
    settings: Settings, assembled: Assembled, template: Template, files: list[Part], held_out: list[Part]
) -> tuple[Prepared, Prepared | None]:
    """Check and open the files of a run for its model; see `prepare`."""
    encoder = Encoder(
        assembled.processor.tokenizer,
        template,
        assembled.model.config.image_token_index,
        ImageLayout.of_config(assembled.model.config),
        settings.train.max_length or 1 << 30,
        settings.data.too_long,  # type: ignore[arg-type]
        positions_of(assembled.model.config.text_config),
    )
    call = partial(
        prepare,
        files,
        encoder,
        seed=settings.train.seed,
        evaluation=held_out,
        skip_check=settings.data.skip_check,
        workers=settings.train.dataset_num_proc,
    )
    return processes.main_first(call)


def _open(checked: Sequence[Checked], repeats: list[float], weights: list[float | None], seed: int) -> Prepared:
    sizes = [part.summary.samples for part in checked]
    if all(weight is not None for weight in weights):
        rates = [weight / max(size, 1) for weight, size in zip(weights, sizes, strict=True) if weight is not None]
        repeats = [rate / min(rates) for rate in rates]
    rows = chosen(sizes, repeats, seed)
    table = concatenate_datasets([part.table for part in checked])
    every = np.concatenate([lengths(part) for part in checked])
    learned = np.concatenate([numbers(part.table, "learned_tokens") for part in checked])
    shown = np.concatenate([numbers(part.table, "images_hash") for part in checked])
    if len(rows) != len(table) or (rows != np.arange(len(table))).any():
        table = table.select(rows)
    return Prepared(
        table.with_transform(checked[0].layout), checked, every[rows], int(learned[rows].sum()), shown[rows]
    )


def chosen(sizes: Sequence[int], repeats: Sequence[float], seed: int) -> np.ndarray:
    """Return the numbers, over all files, of the examples of an epoch: whole copies and a drawn share for the rest."""
    rng = np.random.default_rng(seed)
    out = []
    start = 0
    for size, repeat in zip(sizes, repeats, strict=True):
        whole, share = divmod(repeat, 1.0)
        rows = np.arange(start, start + size)
        out += [rows] * int(whole)
        out.append(np.sort(rng.choice(rows, round(share * size), replace=False)))
        start += size
    return np.concatenate(out)
