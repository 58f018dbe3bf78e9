"""The samples of a step, and who computes them."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch.utils.data import dataloader

from qllava.data.packing import shares_of
from qllava.training.durable.order import ImageOrder, loader

IMAGES = np.array([1, 1, 1, 2, 2, 3, 0, 0, 4, 4, 5, 6, 6])


def batches(processes: int, per_device: int, accumulated: int = 1, images: np.ndarray = IMAGES) -> list[Any]:
    """Of an epoch, [process][batch]."""
    orders = []
    for index in range(processes):
        config: Any = SimpleNamespace(
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulated,
            world_size=processes,
            process_index=index,
            share_image_prefix=True,
            seed=3,
        )
        order = ImageOrder(images, config)
        found = list(order)
        assert len(found) == len(order)
        orders.append(found)
    return orders


def steps(processes: int, per_device: int, accumulated: int = 1) -> list[list[int]]:
    """The samples of each step, whoever computes them."""
    found = batches(processes, per_device, accumulated)
    assert len({len(one) for one in found}) == 1  # nobody waits for one that has ended
    rounds = [sum(together, []) for together in zip(*found, strict=True)]
    starts = range(0, len(rounds), accumulated)
    return [sorted(sum(rounds[start : start + accumulated], [])) for start in starts]


@pytest.mark.parametrize(("processes", "per_device", "accumulated"), [(1, 2, 2), (2, 2, 1), (2, 1, 2), (4, 1, 1)])
def test_a_step_has_the_same_samples_whoever_computes_them(processes: int, per_device: int, accumulated: int) -> None:
    found = steps(processes, per_device, accumulated)
    assert found == steps(1, 4)
    assert sorted(sum(found, [])) == list(range(len(IMAGES)))


def test_only_in_the_last_step_a_process_may_have_nothing() -> None:
    first, second = batches(2, 2)
    assert [len(batch) for batch in first] == [2, 2, 2, 1]
    assert [len(batch) for batch in second] == [2, 2, 2, 0]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_are_of_one_size_and_in_order(count: int) -> None:
    step = np.array([7, 0, 1, 2, 9, 8, 5])
    shares = shares_of(step, IMAGES, count)
    assert sorted(np.concatenate(shares).tolist()) == sorted(step.tolist())
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
    places = {int(index): place for place, index in enumerate(step)}
    assert all([places[i] for i in share.tolist()] == sorted(places[i] for i in share.tolist()) for share in shares)


def test_samples_about_one_image_stay_together() -> None:
    shares = shares_of(np.array([0, 3, 6, 1, 4, 2, 5, 7]), IMAGES, 2)
    for group in ({0, 1, 2}, {3, 4}):
        assert sum(bool(group & set(share.tolist())) for share in shares) == 1


def test_more_than_a_share_has_room_for_is_cut() -> None:
    assert [len(share) for share in shares_of(np.array([0, 1, 2]), IMAGES, 2)] == [2, 1]


def test_signals_wait_until_a_worker_leaves_them_to_the_main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of a second epoch are started while a run may be asked to end."""
    blocked: list[bool] = []
    start = dataloader._MultiProcessingDataLoaderIter.__init__

    def started(self: Any, *arguments: Any) -> None:
        blocked.append(signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        start(self, *arguments)

    monkeypatch.setattr(dataloader._MultiProcessingDataLoaderIter, "__init__", started)
    config = SimpleNamespace(
        dataloader_num_workers=1, dataloader_pin_memory=False, dataloader_persistent_workers=False,
        dataloader_prefetch_factor=2, dataloader_multiprocessing_context=None, dataloader_in_order=True,
        process_index=0,
    )  # fmt: skip
    rows: Any = [{"id": 0}, {"id": 1}]
    order: Any = [[0], [1]]
    batches = loader(rows, order, list, config)  # type: ignore[arg-type]
    for _ in range(2):
        assert [batch[0]["id"] for batch in batches] == [0, 1]
    assert blocked == [True, True]
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
