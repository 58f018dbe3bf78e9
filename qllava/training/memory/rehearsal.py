"""What a rehearsal needs to know: the largest batches of the data, and the memory that the optimizer is yet to take.

Before the first step on a GPU the largest batches are tried (`LlavaTrainer.rehearse`), so that memory runs out at once
and not at step 4,000.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qllava.config import InputError
from qllava.models.errors import out_of_memory
from qllava.training.memory.fake import held_by


def largest(lengths: np.ndarray, images: np.ndarray, count: int) -> list[list[int]]:
    """Return the `count` longest samples, and the longest of those that show images where they are others.

    The longest samples may all be text, which never runs the vision tower.

    Args:
        lengths: Tokens of each sample.
        images: A hash of the images of each sample, 0 for none.
        count: Samples of a batch.

    Returns:
        The places of the samples of each batch, shortest first.
    """
    order = np.argsort(lengths, kind="stable")
    found = (order[-count:].tolist(), order[images[order] != 0][-count:].tolist())
    return [found[0]] if found[1] in ([], found[0]) else list(found)


def moments(
    optim: str, optimizer: torch.optim.Optimizer | None, model: nn.Module, device: torch.device | str
) -> Tensor:
    """Return as many bytes as the optimizer's state will take on the device beyond what it has.

    The state comes with the first step; in a run that is resumed it was loaded before. Under FSDP and ZeRO the
    optimizer knows the share of this rank.

    Args:
        optim: Name of the optimizer.
        optimizer: The optimizer, or None before there is one.
        model: What is trained.
        device: Where the state will be.

    Raises:
        InputError: They do not fit.
    """
    held: Mapping[Any, Any] = optimizer.state if optimizer else {}
    groups: list[dict[str, Any]] = optimizer.param_groups if optimizer else [{"params": model.parameters()}]
    learning = [p for group in groups for p in group["params"] if p.requires_grad]
    shapes = [_local(p).shape for p in learning if not any(map(torch.is_tensor, held.get(p, {}).values()))]
    try:
        return torch.empty(held_by(optim, shapes), dtype=torch.uint8, device=device)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    raise InputError(
        f"There is not enough memory for the model and the state of {optim}. Lower lora_r, or set "
        "optim paged_adamw_8bit."
    )


def state_bytes(optimizer: torch.optim.Optimizer | None) -> int:
    """Return the bytes of the optimizer's state in this process."""
    states: Iterable[Any] = optimizer.state.values() if optimizer else ()
    return sum(_local(value).nbytes for state in states for value in state.values() if torch.is_tensor(value))


def _local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that FSDP shares out; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
