"""Measurements of one optimizer step: a process of `serving` sends them, and `turns` collects them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """Cost and contents of one optimizer step."""

    seconds: float
    """Wall-clock time."""
    samples: int
    """Samples of the step."""
    positions: int
    """Positions in the language model, padding included."""
    learned: int
    """Tokens that the loss counts."""
    needed: int
    """Positions that remain when nothing is padded and no shared prefix is computed twice."""
    flops: int | None
    """FLOPs; None if they were not counted."""
    peak_bytes: int
    """Peak GPU memory in tensors; 0 on a CPU."""
    reserved_bytes: int
    """Peak GPU memory that torch reserved; 0 on a CPU."""
