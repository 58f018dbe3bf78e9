"""Which samples a process computes, batch after batch, and the loader that brings them.

A step has the same samples whatever the number of processes: they are drawn for the whole step (`packing.steps_of`)
and then shared out (`packing.shares_of`). So runs with the same samples per step learn the same, and one that was
stopped continues with another number of processes.
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
    """Of all processes and accumulated batches together."""
    return int(config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size)


def total_steps(config: TrainConfig, samples: int) -> int:
    """Return how many optimizer steps a stage has over so many samples of an epoch."""
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(-(-samples // samples_per_step(config)) * config.num_train_epochs)


class ImageOrder(Sampler[list[int]]):
    """The batches of one process in an epoch; the same seed and epoch give the same ones.

    A step's samples are shared out to the batches of all processes, one round after the other. In a last step that is
    short, rounds without samples are left out; in its one round a process may have none, and gets an empty batch.
    """

    def __init__(self, images: np.ndarray, config: TrainConfig) -> None:
        """Args:
        images: a hash of the images of each sample, 0 for none.
        config: of this process, by its `process_index`.
        """
        self.images, self.config = images, config
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer at the beginning of each epoch."""
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
    """The held-out batches of one process, each sample in one process only.

    All have equally many batches, because they wait for each other: in the last round a process may get an empty one.
    """

    def __init__(self, count: int, config: TrainConfig) -> None:
        """Args:
        count: number of samples.
        config: of this process, by its `process_index`.
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
    """The batches of this process, on the host: all batches of an optimizer step are there at once, pixels included.

    A pack is moved to the device when it is computed. accelerate is told of one process: sharing out is done, and its
    own would make up samples for a short step. again: it is iterated more than once, so that workers may persist.
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
