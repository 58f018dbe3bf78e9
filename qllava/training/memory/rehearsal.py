"""Inputs of a rehearsal: the largest batches of the data, and the memory that the optimizer will still allocate.

Before the first step on a GPU the largest batches are tried (`LlavaTrainer.rehearse`), so that a run fails at once and
not at step 4,000 if memory does not suffice.
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
    """Return the `count` longest samples, and the `count` longest with images if those are different.

    The longest samples may all be text, which never runs the vision tower.

    Args:
        lengths: Tokens of each sample.
        images: Hash of the images of each sample; 0 for none.
        count: Samples per batch.

    Returns:
        The indices of the samples of each batch, shortest first.
    """
    order = np.argsort(lengths, kind="stable")
    found = (order[-count:].tolist(), order[images[order] != 0][-count:].tolist())
    return [found[0]] if found[1] in ([], found[0]) else list(found)


def moments(
    optim: str, optimizer: torch.optim.Optimizer | None, model: nn.Module, device: torch.device | str
) -> Tensor:
    """Return a tensor of as many bytes as the optimizer's state will still allocate on the device.

    The state is allocated in the first step; in a resumed run it is already loaded. Under FSDP and ZeRO the optimizer
    knows this rank's share.

    Args:
        optim: Name of the optimizer.
        optimizer: The optimizer, or None before there is one.
        model: The model that is trained.
        device: Device of the state.

    Raises:
        InputError: The bytes do not fit.
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
    """Return this rank's part of a tensor sharded by FSDP; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
