"""Switch for a shortcut of qllava: the head computes all positions, as it would without `training.exact`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def compute_whole_head(model: Any) -> None:
    """Make the head compute as many positions as the pack has, and discard those that are not learned.

    Positions that are not learned are zeros here; their values do not change the cost.
    """
    seen: dict[str, int] = {}
    plain = model.lm_head.forward

    def remember(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen["positions"] = kwargs["inputs_embeds"].shape[1]

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        padding = hidden.new_zeros(max(0, seen["positions"] - len(hidden)), hidden.shape[1])
        out: torch.Tensor = plain(torch.cat([hidden, padding]))[: len(hidden)]
        return out

    model.model.language_model.register_forward_pre_hook(remember, with_kwargs=True)
    model.lm_head.forward = forward
