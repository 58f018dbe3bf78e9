"""Held-out figures: means over all learned tokens, whatever the batch size and the number of processes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qllava.training.durable.order import InOrder
from tests.tiny_runs import Tiny, make_trainer

FIGURES = ("eval_loss", "eval_entropy", "eval_mean_token_accuracy")


def figures(trainer: Any, **fields: Any) -> list[float]:
    for name, value in fields.items():
        setattr(trainer.args, name, value)
    trainer.evaluate(trainer.train_dataset)
    last = trainer.state.log_history[-1]
    return [last[name] for name in FIGURES]


def test_they_do_not_depend_on_the_batch_size(tiny: Tiny, tmp_path: Path) -> None:
    trainer = make_trainer(tiny, tmp_path)
    learned = [sum(label != -100 for label in row["labels"]) for row in trainer.train_dataset]  # type: ignore[union-attr]
    assert len(learned) == 8 and len(set(learned)) > 1, "equal counts would hide a mean of means"
    one, two, five, eight = (figures(trainer, per_device_eval_batch_size=size) for size in (1, 2, 5, 8))
    for other in (two, five, eight):
        assert other == pytest.approx(one, rel=1e-6)
    # And they are what the model says of each sample, taken together here once more.
    batches = [trainer.data_collator([row]) for row in trainer.train_dataset]  # type: ignore[union-attr]
    each = [trainer.sums(trainer.model, batch) for batch in batches]
    assert [sums["tokens"] for sums in each] == learned
    names = ("loss", "entropy", "mean_token_accuracy")
    assert one == pytest.approx([sum(sums[name] for sums in each) / sum(learned) for name in names], rel=1e-6)
    mean_of_means = sum(sums["loss"] / n for sums, n in zip(each, learned, strict=True)) / 8
    assert abs(mean_of_means - one[0]) > 1e-4


def test_nor_on_the_rows_of_a_batch(tiny: Tiny, tmp_path: Path) -> None:
    trainer = make_trainer(tiny, tmp_path, per_device_eval_batch_size=8)
    whole = figures(trainer)
    trainer.data_collator.shorten(90)  # type: ignore[attr-defined]
    assert figures(trainer) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 8, 13])
def test_each_sample_is_in_one_process(world: int, count: int) -> None:
    shares = []
    for index in range(world):
        config: Any = SimpleNamespace(per_device_eval_batch_size=2, world_size=world, process_index=index)
        batches = list(InOrder(count, config))
        assert len(batches) == len(InOrder(count, config)) and all(len(batch) <= 2 for batch in batches)
        shares.append(batches)
    assert len({len(batches) for batches in shares}) == 1, "they wait for each other"
    assert sorted(index for batches in shares for batch in batches for index in batch) == list(range(count))
