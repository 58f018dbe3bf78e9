"""Samples -> tensors: laid out as packs, or one below the other, padded on the right.

    B samples, S tokens of the longest, I images of all samples together, H x W pixels

    input_ids       (B, S)  pad_token_id behind the end
    labels          (B, S)  IGNORE_INDEX there
    attention_mask  (B, S)  1 for tokens, 0 behind the end
    pixel_values    (I, 3, H, W)  in the order of the image tokens, sample by sample; absent when no sample has an image
    ids             the samples' ids, for messages; the trainer takes them out before the model sees the batch

Images are opened here, when they are needed: a data set of any size costs no memory.
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
from qllava.data.packing import Pack, lay_out, packs_of


@dataclass(frozen=True)
class Collator:
    """Makes a batch of samples {"id", "input_ids", "labels", "images": paths as text}.

    The column is not called image or images, because TRL would then take the data set over as one of images.

    pad_token_id: what stands behind the end of a shorter sample; never looked at, never learned.
    image_processor: turns RGB images into pixel_values, all of one size.

    Raises InputError, with file and id, when an image cannot be read.
    """

    pad_token_id: int
    image_processor: BaseImageProcessor

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch; see the head of this file."""
        lengths = [len(sample["input_ids"]) for sample in samples]
        shape = (len(samples), max(lengths))
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.long)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        for index, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
            input_ids[index, :length] = torch.tensor(sample["input_ids"])
            labels[index, :length] = torch.tensor(sample["labels"])
            attention_mask[index, :length] = 1
        batch: dict[str, Any] = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
        batch["ids"] = [str(sample["id"]) for sample in samples]
        images = [_open(sample["id"], path) for sample in samples for path in sample["image_files"]]
        if images:
            batch["pixel_values"] = self.image_processor(images=images, return_tensors="pt")["pixel_values"]
        return batch


@dataclass(frozen=True)
class Kept:
    """Samples as the collator got them; of a type of its own, so that nothing looks for tensors inside."""

    samples: list[dict[str, Any]]
    images: list[tuple[str, ...]]
    """Of each pack, the paths of its images in the order of its pixel_values."""


class PackCollator:
    """Lays the samples of a batch out as packs (`packing`), for the forward pass of `training.exact`.

        lengths  (N,)  tokens of each sample; the first entry, because the trainer counts samples by it
        labels   (1, S of all packs)  the tokens that are to come, for what only counts them
        packs    a list; each as `pack_tensors` has it, and `pixel_values` (I, 3, H, W) of its distinct images, absent
                 when it has none
        ids      of the samples, for messages
        kept     the samples and the paths of their images, for `again`

    Of no samples (a process without a share of the step) it makes one pack that weighs nothing.
    Raises InputError, with file and id, when an image cannot be read.
    """

    def __init__(
        self,
        image_token_id: int,
        image_processor: BaseImageProcessor,
        share: bool = True,
        tokens_per_pack: int | None = None,
    ) -> None:
        """Args:
        image_token_id: the id of `<image>`.
        image_processor: turns RGB images into pixel_values, all of one size.
        share: whether samples about the same images share their tokens.
        tokens_per_pack: most tokens of a pack; None: all in one.
        """
        self.image_token_id, self.image_processor, self.share = image_token_id, image_processor, share
        # In shared memory: the workers of a loader have copies of this object, made when they were started, and read
        # the present value; 0 for None.
        self._limit = torch.tensor([tokens_per_pack or 0]).share_memory_()

    @property
    def tokens_per_pack(self) -> int | None:
        """Most tokens of a pack, now."""
        return int(self._limit[0]) or None

    def shorten(self, tokens_per_pack: int) -> None:
        """Make shorter packs from here on, in every process that holds a copy of this collator."""
        self._limit[0] = tokens_per_pack

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch."""
        return self._laid_out(samples, self._pixels(samples))

    def again(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The same samples in packs of the present length; their images are not decoded again."""
        packs = zip(batch["kept"].images, batch["packs"], strict=True)
        pixels = {
            path: x for paths, pack in packs if paths for path, x in zip(paths, pack["pixel_values"], strict=True)
        }
        return self._laid_out(batch["kept"].samples, pixels)

    def _laid_out(self, samples: list[dict[str, Any]], pixels: dict[str, torch.Tensor]) -> dict[str, Any]:
        """pixels: (3, H, W) of each distinct image of the samples, by its path."""
        if not samples:
            labels = torch.empty((1, 0), dtype=torch.long)
            lengths = torch.empty(0, dtype=torch.long)
            kept = Kept([], [()])
            return {"lengths": lengths, "labels": labels, "packs": [weightless_pack()], "ids": [], "kept": kept}
        packs = packs_of(samples, self.image_token_id, tokens_per_pack=self.tokens_per_pack, share=self.share)
        batch: dict[str, Any] = {
            "lengths": torch.tensor([len(sample["input_ids"]) for sample in samples]),
            "labels": torch.from_numpy(np.concatenate([pack.shift_labels for pack in packs]))[None],
            "packs": [pack_tensors(pack) for pack in packs],
            "ids": [str(sample["id"]) for sample in samples],
            "kept": Kept(samples, [tuple(pack.images) for pack in packs]),
        }
        for pack, tensors in zip(packs, batch["packs"], strict=True):
            if pack.images:
                tensors["pixel_values"] = torch.stack([pixels[path] for path in pack.images])
        return batch

    def _pixels(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """(3, H, W) of each distinct image of the batch."""
        owner = {path: sample["id"] for sample in reversed(samples) for path in sample["image_files"]}
        if not owner:
            return {}
        opened = [_open(id, path) for path, id in owner.items()]
        values = self.image_processor(images=opened, return_tensors="pt")["pixel_values"]
        return dict(zip(owner, values, strict=True))


def pack_tensors(pack: Pack) -> dict[str, Any]:
    """A pack as the model takes it, but for its pixels.

    input_ids, position_ids (1, S); image_places, features (P,): where the image tokens stand, and which feature is put
    there; learned, targets (L,): the places that predict a learned token, and that token; learned_counts: how many of
    them are in each branch; pack_groups: what is where.
    """
    learned = np.flatnonzero(pack.shift_labels != IGNORE_INDEX)
    edges = [
        group.start + group.prefix + sum(group.branches[:n])
        for group in pack.groups
        for n in range(len(group.branches))
    ]
    counts = np.diff(np.searchsorted(learned, [*edges, len(pack.input_ids)]))
    return {
        "input_ids": torch.from_numpy(pack.input_ids)[None],
        "position_ids": torch.from_numpy(pack.position_ids)[None],
        "image_places": torch.from_numpy(pack.image_places),
        "features": torch.from_numpy(pack.features),
        "learned": torch.from_numpy(learned),
        "targets": torch.from_numpy(pack.shift_labels[learned]),
        "learned_counts": tuple(counts.tolist()),
        "pack_groups": pack.groups,
    }


def weightless_pack() -> dict[str, Any]:
    """A pack of two tokens that teaches nothing: what a process computes while others still have packs.

    All go through the model equally often, because they wait for each other inside.
    """
    sample = {"id": "", "input_ids": [0, 0], "labels": [IGNORE_INDEX, 0], "image_files": [], "image_tokens": []}
    return {**pack_tensors(lay_out([sample], IGNORE_INDEX)), "weightless": True}


def _open(id: str, path: str) -> Image.Image:
    try:
        return open_image(Path(path))
    except InputError as error:
        raise InputError(f"id {id}: {error}") from error
