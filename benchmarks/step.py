"""The measurements of one optimizer step: a process of `serving` sends them, and `turns` collects them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """What one optimizer step took, and what was in it."""

    seconds: float
    """Wall-clock time."""
    samples: int
    """Samples of the step."""
    positions: int
    """Tokens that went through the language model."""
    learned: int
    """Tokens that the loss counts."""
    needed: int
    """Positions that remain when nothing is padded and no shared prefix is computed twice."""
    flops: int | None
    """None where they were not counted."""
    peak_bytes: int
    """Most memory of the GPU in tensors; 0 on a CPU."""
    reserved_bytes: int
    """Most memory of the GPU with what torch keeps; 0 on a CPU."""
