"""Rows -> tensors: samples laid out as one row, or one below the other, padded on the right.

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

import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor

from qllava.config import InputError
from qllava.data.encode import IGNORE_INDEX
from qllava.data.images import open_image
from qllava.data.packing import lay_out


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
class RowCollator:
    """Lays the samples of a batch out as one row (`packing`), for the forward pass of `training.exact`.

    image_token_id: the id of `<image>`.
    image_processor: turns RGB pictures into pixel_values, all of one size.
    share: whether samples about the same pictures share their tokens.

        lengths       (N,)    tokens of each sample; the first entry, because the trainer counts samples by it
        input_ids, position_ids, shift_labels, labels  (1, S); labels are shift_labels, for what only counts them
        features      (P,)    which feature stands at each image token
        row_groups    who stands where
        pixel_values  (I, 3, H, W) of the distinct pictures; absent when there is none
        ids           of the samples, for messages; the trainer takes them out

    Raises InputError, with file and id, when a picture cannot be read.
    """

    image_token_id: int
    image_processor: BaseImageProcessor
    share: bool = True

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch."""
        row = lay_out(rows, self.image_token_id, share=self.share)
        shift_labels = torch.from_numpy(row.shift_labels)[None]
        batch: dict[str, Any] = {
            "lengths": torch.tensor([len(sample["input_ids"]) for sample in rows]),
            "input_ids": torch.from_numpy(row.input_ids)[None],
            "position_ids": torch.from_numpy(row.position_ids)[None],
            "shift_labels": shift_labels,
            "labels": shift_labels,
            "features": torch.from_numpy(row.features),
            "row_groups": row.groups,
            "ids": [str(sample["id"]) for sample in rows],
        }
        if row.pictures:
            owner = {path: sample["id"] for sample in reversed(rows) for path in sample["pictures"]}
            pictures = [_open(owner[path], path) for path in row.pictures]
            batch["pixel_values"] = self.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        return batch


def _open(id: str, path: str) -> Image.Image:
    try:
        return open_image(Path(path))
    except InputError as error:
        raise InputError(f"id {id}: {error}") from error
