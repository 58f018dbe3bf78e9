"""Order of the samples that a rank computes, batch by batch, and the loader of the batches.

A step has the same samples whatever the number of ranks: they are drawn for the whole step (`packing.steps_of`) and
then distributed (`packing.shares_of`). So runs with the same samples per step learn the same, and a run can be resumed
with another number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_utils import seed_worker

from qllava.data.packing import shares_of, steps_of
from qllava.training.durable.signals import held_back, leave_to_main
from qllava.training.settings import TrainConfig


def samples_per_step(config: TrainConfig) -> int:
    """Return the number of samples per optimizer step, over all ranks and accumulated batches."""
    return int(config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size)


def total_steps(config: TrainConfig, samples: int) -> int:
    """Return the number of optimizer steps of a stage whose epoch has that many samples."""
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(-(-samples // samples_per_step(config)) * config.num_train_epochs)


class ImageOrder(Sampler[list[int]]):
    """Batches of one rank in an epoch; the same seed and epoch give the same batches.

    The samples of a step are distributed to the batches of all ranks, round by round. If the last step is short, rounds
    without samples are left out; in its only round a rank may have no sample, and gets an empty batch.
    """

    def __init__(self, images: np.ndarray, config: TrainConfig) -> None:
        """Start at the first epoch.

        Args:
            images: Hash of the images of each sample; 0 for none.
            config: Settings of this rank, which has `process_index`.
        """
        self.images, self.config = images, config
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; the trainer calls this at the beginning of each."""
        self.epoch = epoch

    def _rounds(self, samples: int) -> int:
        return int(-(-samples // (self.config.per_device_train_batch_size * self.config.world_size)))

    def __len__(self) -> int:
        # Full steps are full rounds: only the last round of an epoch is short.
        return self._rounds(len(self.images))

    def __iter__(self) -> Iterator[list[int]]:
        config, share = self.config, self.config.share_image_prefix
        images = self.images if share else np.zeros_like(self.images)
        steps = steps_of(self.images, samples_per_step(config), seed=config.seed, epoch=self.epoch, share=share)
        for step in steps:
            shares = shares_of(step, images, self._rounds(len(step)) * config.world_size)
            yield from (one.tolist() for one in shares[config.process_index :: config.world_size])


class InOrder(Sampler[list[int]]):
    """Held-out batches of one rank; each sample is on one rank only.

    All ranks have the same number of batches, because they wait for each other: in the last round a rank may get an
    empty one.
    """

    def __init__(self, count: int, config: TrainConfig) -> None:
        """Distribute the samples.

        Args:
            count: Number of samples.
            config: Settings of this rank, which has `process_index`.
        """
        self.count, self.config = count, config

    def __len__(self) -> int:
        return int(-(-self.count // (self.config.per_device_eval_batch_size * self.config.world_size)))

    def __iter__(self) -> Iterator[list[int]]:
        size, processes = self.config.per_device_eval_batch_size, self.config.world_size
        for number in range(len(self)):
            start = (number * processes + self.config.process_index) * size
            yield list(range(start, min(start + size, self.count)))


def loader(rows: Dataset, order: Sampler[list[int]], collate: Any, config: TrainConfig, *, again: bool = True) -> Any:
    """Return a loader of this rank's batches, on the host; it yields a whole optimizer step at once, pixels included.

    A pack is moved to the device when it is computed. accelerate is configured for one process, because the samples are
    distributed already and its own distribution would repeat samples to fill a short step.

    Args:
        rows: The samples.
        order: The batches of this rank.
        collate: Makes a batch of samples.
        config: The loop's settings.
        again: Whether the loader is iterated more than once, so that its workers can persist.
    """
    workers = config.dataloader_num_workers
    batches = DataLoader(
        rows,
        batch_sampler=order,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=config.dataloader_pin_memory,
        persistent_workers=config.dataloader_persistent_workers and again,
        prefetch_factor=config.dataloader_prefetch_factor,
        multiprocessing_context=config.dataloader_multiprocessing_context,
        in_order=config.dataloader_in_order,
        worker_init_fn=partial(_begin_worker, workers=workers, rank=config.process_index),
    )
    prepared: Any = prepare_data_loader(batches, num_processes=1, process_index=0, put_on_device=False)
    inner = prepared.base_dataloader
    start = inner._get_iterator

    def started() -> Any:
        with held_back():
            return start()

    inner._get_iterator = started
    return prepared


def _begin_worker(number: int, *, workers: int, rank: int) -> None:
    leave_to_main()
    seed_worker(number, num_workers=workers, rank=rank)
