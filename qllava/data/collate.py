"""Samples -> tensors: laid out as rows, or one below the other, padded on the right.

    B rows, S tokens of the longest, I pictures of all rows together, H x W pixels

    input_ids       (B, S)  pad_token_id behind the end
    labels          (B, S)  IGNORE_INDEX there
    attention_mask  (B, S)  1 for tokens, 0 behind the end
    pixel_values    (I, 3, H, W)  in the order of the image tokens, row by row; absent when no row has a picture
    ids             the rows' ids, for messages; the trainer takes them out before the model sees the batch

Pictures are opened here, when they are needed: a data set of any size costs no memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor

from qllava.config import InputError
from qllava.data.encode import IGNORE_INDEX
from qllava.data.images import open_image
from qllava.data.packing import Row, lay_out, rows_of


@dataclass(frozen=True)
class Collator:
    """Makes a batch of rows {"id", "input_ids", "labels", "pictures": paths as text}.

    The column is not called image or images, because TRL would then take the data set over as one of pictures.

    pad_token_id: what stands behind the end of a shorter row; never looked at, never learned.
    image_processor: turns RGB pictures into pixel_values, all of one size.

    Raises InputError, with file and id, when a picture cannot be read.
    """

    pad_token_id: int
    image_processor: BaseImageProcessor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch; see the head of this file."""
        lengths = [len(row["input_ids"]) for row in rows]
        shape = (len(rows), max(lengths))
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.long)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            input_ids[index, :length] = torch.tensor(row["input_ids"])
            labels[index, :length] = torch.tensor(row["labels"])
            attention_mask[index, :length] = 1
        batch: dict[str, Any] = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
        batch["ids"] = [str(row["id"]) for row in rows]
        pictures = [_open(row["id"], path) for row in rows for path in row["pictures"]]
        if pictures:
            batch["pixel_values"] = self.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        return batch


@dataclass(frozen=True)
class Kept:
    """Samples as the collator got them; of a type of its own, so that nothing looks for tensors inside."""

    samples: list[dict[str, Any]]
    pictures: list[tuple[str, ...]]
    """Of each row, the paths of its images in the order of its pixel_values."""


class RowCollator:
    """Lays the samples of a batch out as rows (`packing`), for the forward pass of `training.exact`.

        lengths  (N,)  tokens of each sample; the first entry, because the trainer counts samples by it
        labels   (1, S of all rows)  the tokens that are to come, for what only counts them
        rows     a list; each as `row_tensors` has it, and `pixel_values` (I, 3, H, W) of its distinct pictures, absent
                 when it has none
        ids      of the samples, for messages
        kept     the samples and the paths of their images, for `again`

    Of no samples (a process without a share of the step) it makes one row that weighs nothing.
    Raises InputError, with file and id, when a picture cannot be read.
    """

    def __init__(
        self,
        image_token_id: int,
        image_processor: BaseImageProcessor,
        share: bool = True,
        tokens_per_row: int | None = None,
    ) -> None:
        """Args:
        image_token_id: the id of `<image>`.
        image_processor: turns RGB pictures into pixel_values, all of one size.
        share: whether samples about the same pictures share their tokens.
        tokens_per_row: most tokens of a row; None: all in one.
        """
        self.image_token_id, self.image_processor, self.share = image_token_id, image_processor, share
        # In shared memory: the workers of a loader have copies of this object, made when they were started, and read
        # the present value; 0 for None.
        self._limit = torch.tensor([tokens_per_row or 0]).share_memory_()

    @property
    def tokens_per_row(self) -> int | None:
        """Most tokens of a row, now."""
        return int(self._limit[0]) or None

    def shorten(self, tokens_per_row: int) -> None:
        """Make shorter rows from here on, in every process that holds a copy of this collator."""
        self._limit[0] = tokens_per_row

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch."""
        return self._laid_out(samples, self._pixels(samples))

    def again(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The same samples in rows of the present length; their images are not decoded again."""
        rows = zip(batch["kept"].pictures, batch["rows"], strict=True)
        pixels = {path: x for paths, row in rows if paths for path, x in zip(paths, row["pixel_values"], strict=True)}
        return self._laid_out(batch["kept"].samples, pixels)

    def _laid_out(self, samples: list[dict[str, Any]], pixels: dict[str, torch.Tensor]) -> dict[str, Any]:
        """pixels: (3, H, W) of each distinct image of the samples, by its path."""
        if not samples:
            labels = torch.empty((1, 0), dtype=torch.long)
            lengths = torch.empty(0, dtype=torch.long)
            kept = Kept([], [()])
            return {"lengths": lengths, "labels": labels, "rows": [weightless_row()], "ids": [], "kept": kept}
        rows = rows_of(samples, self.image_token_id, tokens_per_row=self.tokens_per_row, share=self.share)
        batch: dict[str, Any] = {
            "lengths": torch.tensor([len(sample["input_ids"]) for sample in samples]),
            "labels": torch.from_numpy(np.concatenate([row.shift_labels for row in rows]))[None],
            "rows": [row_tensors(row) for row in rows],
            "ids": [str(sample["id"]) for sample in samples],
            "kept": Kept(samples, [tuple(row.pictures) for row in rows]),
        }
        for row, tensors in zip(rows, batch["rows"], strict=True):
            if row.pictures:
                tensors["pixel_values"] = torch.stack([pixels[path] for path in row.pictures])
        return batch

    def _pixels(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """(3, H, W) of each distinct picture of the batch."""
        owner = {path: sample["id"] for sample in reversed(samples) for path in sample["pictures"]}
        if not owner:
            return {}
        opened = [_open(id, path) for path, id in owner.items()]
        values = self.image_processor(images=opened, return_tensors="pt")["pixel_values"]
        return dict(zip(owner, values, strict=True))


def row_tensors(row: Row) -> dict[str, Any]:
    """A row as the model takes it, but for its pixels.

    input_ids, position_ids (1, S); image_places, features (P,): where the image tokens stand, and which feature is put
    there; learned, targets (L,): the places that predict a learned token, and that token; learned_counts: how many of
    them are in each branch; row_groups: what is where.
    """
    learned = np.flatnonzero(row.shift_labels != IGNORE_INDEX)
    edges = [
        group.start + group.prefix + sum(group.branches[:n]) for group in row.groups for n in range(len(group.branches))
    ]
    counts = np.diff(np.searchsorted(learned, [*edges, len(row.input_ids)]))
    return {
        "input_ids": torch.from_numpy(row.input_ids)[None],
        "position_ids": torch.from_numpy(row.position_ids)[None],
        "image_places": torch.from_numpy(row.image_places),
        "features": torch.from_numpy(row.features),
        "learned": torch.from_numpy(learned),
        "targets": torch.from_numpy(row.shift_labels[learned]),
        "learned_counts": tuple(counts.tolist()),
        "row_groups": row.groups,
    }


def weightless_row() -> dict[str, Any]:
    """A row of two tokens that teaches nothing: what a process computes while others still have rows.

    All go through the model equally often, because they wait for each other inside.
    """
    sample = {"id": "", "input_ids": [0, 0], "labels": [IGNORE_INDEX, 0], "pictures": [], "image_tokens": []}
    return {**row_tensors(lay_out([sample], IGNORE_INDEX)), "weightless": True}


def _open(id: str, path: str) -> Image.Image:
    try:
        return open_image(Path(path))
    except InputError as error:
        raise InputError(f"id {id}: {error}") from error
