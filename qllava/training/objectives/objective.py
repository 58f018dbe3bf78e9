"""The signature of an objective: log-probabilities of a pack's learned tokens in, a loss and metrics out.

An objective is a plain function. The trainer calls it for every pack, in training and for held-out samples, and takes
the gradient of its loss. It needs no model and no trainer, so it can be tested with a few numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from qllava.training.step.exact import PackOutput


@dataclass(frozen=True)
class Outcome:
    """Result of an objective for one pack."""

    loss: Tensor
    """Scalar with a gradient: this pack's share of the loss of the optimizer step."""
    learned: Tensor
    """Number of learned tokens of the pack, a scalar; 0 for a weightless pack."""
    sums: dict[str, Tensor]
    """Metrics by the names under which they are logged, each summed over the learned tokens; without gradient."""


Objective = Callable[[PackOutput, Tensor | None], Outcome]
"""Function of the outputs of a pack, (L,) each, and the number of learned tokens of the optimizer step over all ranks.
If that number is None, the loss is the mean over this pack's own learned tokens."""
