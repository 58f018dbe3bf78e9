"""An objective over held-out samples: sums over their learned tokens, and means over all ranks.

So the figures depend neither on the batch size nor on the number of ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from qllava.training.durable import processes
from qllava.training.objectives.objective import Objective
from qllava.training.step.packs import evened

TOKENS = "tokens"
"""Key of the number of learned tokens among the sums."""


@torch.no_grad()
def sums(
    objective: Objective,
    model: nn.Module,
    batch: Mapping[str, Any],
    to_device: Callable[[dict[str, Any]], dict[str, Any]],
) -> dict[str, float]:
    """Return `loss` and the metrics of a batch, each summed over its learned tokens, and their number, `tokens`.

    Args:
        objective: Computes loss and metrics of each pack.
        model: A model that accepts packs, inside `looking_at`.
        batch: A batch made by `PackCollator`.
        to_device: Moves a pack to the model's device.
    """
    found: dict[str, float] = defaultdict(float)
    for pack in evened(batch["packs"]):
        one = objective(model(**to_device(pack), use_cache=False), None)
        learned = one.learned.clamp(min=1)
        means = torch.stack([one.loss, *(value / learned for value in one.sums.values())]).tolist()
        count = int(one.learned)
        for name, mean in zip(("loss", *one.sums), means, strict=True):
            found[name] += mean * count
        found[TOKENS] += count
    return dict(found)


def means(found: Mapping[str, float]) -> dict[str, float]:
    """Return the means over the learned tokens of all ranks, given the sums of this rank."""
    total = dict(zip(found, processes.total(list(found.values())), strict=True))
    tokens = total.pop(TOKENS)
    return {name: value / tokens for name, value in total.items()}
