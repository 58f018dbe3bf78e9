"""Resuming a paged optimizer: its state is allocated as in a new run, in memory that moves to the host when needed.

bitsandbytes' `load_state_dict` copies the saved moments to the device as ordinary tensors, so a run that fitted before
it was stopped may no longer fit. Here the optimizer allocates its state itself, as in its first step, and the saved
values are copied into it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch


def keep_paged(optimizer: Any) -> None:
    """Make an optimizer restore its state into its own allocations; one that is not paged is unchanged.

    Args:
        optimizer: A bitsandbytes optimizer, or any other.
    """
    if getattr(optimizer, "is_paged", False):
        optimizer.load_state_dict = partial(_load, optimizer)


def _load(optimizer: Any, state_dict: dict[str, Any]) -> None:
    type(optimizer).load_state_dict(optimizer, state_dict, move_to_device=False)
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            saved = optimizer.state.pop(parameter, {})
            if not saved:
                continue
            optimizer.init_state(group, parameter, group_index, index)
            own = optimizer.state[parameter]
            for name, value in saved.items():
                if isinstance(value, torch.Tensor) and isinstance(own.get(name), torch.Tensor):
                    own[name].copy_(value)
                else:
                    own[name] = value
