"""On a CPU a step takes its memory from what the last one freed."""

from __future__ import annotations

import mmap
import sys

import pytest

from tests import commands

FAULTS = """
import resource, torch
from qllava.training.memory.allocator import keep_freed_memory
taken = keep_freed_memory()
def step():
    before, held = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, [torch.ones(2 << 20)]  # 8 MB
    for _ in range(20):
        held.append(held[-1] * 2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults = [step() for _ in range(25)]
print(taken, sum(faults[5:]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is Linux's")
def test_freed_memory_is_kept() -> None:
    """Twenty steps, after five in which the heap finds its size; without the call nearly all of their pages are new."""
    done = commands.run("-c", FAULTS)
    assert done.returncode == 0, done.stderr
    taken, faults = done.stdout.split()
    if taken == "False":
        pytest.skip("another C library than glibc")
    assert int(faults) < 0.1 * 20 * 21 * (8 << 20) / mmap.PAGESIZE
