"""Collators: samples to tensors, as packs or as a batch padded on the right.

    B samples, S tokens of the longest, I images of all samples together, H x W pixels

    input_ids       (B, S)  pad_token_id after the end of a sample
    labels          (B, S)  IGNORE_INDEX after the end of a sample
    attention_mask  (B, S)  1 for tokens, 0 after the end of a sample
    pixel_values    (I, 3, H, W)  in the order of the image tokens, sample by sample; absent when no sample has an image
    ids             ids of the samples, for messages; the trainer removes them before the model gets the batch

Images are opened here, when they are needed, so the size of a data set costs no memory.
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
    """Collator of samples {"id", "input_ids", "labels", "image_files": paths as text} into a padded batch.

    The column is not called image or images, because TRL would then process the data set as one of images.
    """

    pad_token_id: int
    """Id that fills a shorter sample at its end; it is masked and never learned."""
    image_processor: BaseImageProcessor
    """Processor of RGB images into pixel_values, all of one size."""

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch described in the module's docstring.

        Raises:
            InputError: An image cannot be read; the message names file and id.
        """
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
    """Samples as the collator got them; a separate type, so that libraries do not look for tensors inside."""

    samples: list[dict[str, Any]]
    """The samples."""
    images: list[tuple[str, ...]]
    """For each pack, the paths of its images in the order of its pixel_values."""


class PackCollator:
    """Collator of samples into packs (`packing`), for the forward pass of `training.exact`.

        lengths  (N,)  tokens of each sample; the first entry, because the trainer counts samples by it
        labels   (1, S of all packs)  labels of the next tokens, for code that only counts them
        packs    a list; each entry from `pack_tensors`, with `pixel_values` (I, 3, H, W) of its distinct images, absent
                 if it has none
        ids      ids of the samples, for messages
        kept     the samples and the paths of their images, for `again`

    An empty list of samples (on a rank without a share of the step) becomes one weightless pack.
    """

    def __init__(
        self,
        image_token_id: int,
        image_processor: BaseImageProcessor,
        share: bool = True,
        tokens_per_pack: int | None = None,
    ) -> None:
        """Create the collator.

        Args:
            image_token_id: Id of the `<image>` token.
            image_processor: Processor of RGB images into pixel_values, all of one size.
            share: Whether samples about the same images share their tokens.
            tokens_per_pack: Maximum number of tokens in a pack; None puts all samples into one pack.
        """
        self.image_token_id, self.image_processor, self.share = image_token_id, image_processor, share
        # In shared memory, because the workers of a data loader have copies of this object, made when they were
        # started, and must read the current value; 0 for None.
        self._limit = torch.tensor([tokens_per_pack or 0]).share_memory_()

    @property
    def tokens_per_pack(self) -> int | None:
        """Current maximum number of tokens in a pack; None for no maximum."""
        return int(self._limit[0]) or None

    def shorten(self, tokens_per_pack: int) -> None:
        """Set a lower maximum for later packs, in every process that has a copy of this collator."""
        self._limit[0] = tokens_per_pack

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch described in the class's docstring.

        Raises:
            InputError: An image cannot be read; the message names file and id.
        """
        return self._laid_out(samples, self._pixels(samples))

    def again(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the same samples in packs of the current maximum length, without decoding their images again."""
        packs = zip(batch["kept"].images, batch["packs"], strict=True)
        pixels = {
            path: x for paths, pack in packs if paths for path, x in zip(paths, pack["pixel_values"], strict=True)
        }
        return self._laid_out(batch["kept"].samples, pixels)

    def _laid_out(self, samples: list[dict[str, Any]], pixels: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Return the batch of samples; `pixels` holds (3, H, W) of each distinct image by its path."""
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
        """Return (3, H, W) of each distinct image of the batch, by its path."""
        owner = {path: sample["id"] for sample in reversed(samples) for path in sample["image_files"]}
        if not owner:
            return {}
        opened = [_open(id, path) for path, id in owner.items()]
        values = self.image_processor(images=opened, return_tensors="pt")["pixel_values"]
        return dict(zip(owner, values, strict=True))


def pack_tensors(pack: Pack) -> dict[str, Any]:
    """Return a pack as the model takes it, except its pixels.

    Returns:
        input_ids, position_ids: (1, S) each.
        image_places, features: (P,) positions of the image tokens, and the index of the feature at each.
        learned, targets: (L,) positions that predict a learned token, and that token.
        learned_counts: Number of learned tokens in each branch.
        pack_groups: Groups of the pack.
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
    """Return a pack of two tokens with weight 0, which a rank computes while other ranks still have packs.

    All ranks must run the model equally often, because they wait for each other in it.
    """
    sample = {"id": "", "input_ids": [0, 0], "labels": [IGNORE_INDEX, 0], "image_files": [], "image_tokens": []}
    return {**pack_tensors(lay_out([sample], IGNORE_INDEX)), "weightless": True}


def _open(id: str, path: str) -> Image.Image:
    try:
        return open_image(Path(path))
    except InputError as error:
        raise InputError(f"id {id}: {error}") from error
