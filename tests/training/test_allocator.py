"""On a CPU a step takes its memory from what the last one freed."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from qllava.training.allocator import keep_freed_memory
taken = keep_freed_memory() if sys.argv[1] == "kept" else None
def step():
    before, held = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, [torch.ones(2 << 20)]  # 8 MB
    for _ in range(20):
        held.append(held[-1] * 2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(3):
    faults = step()
print(taken, faults)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is Linux's")
def test_freed_memory_is_kept() -> None:
    kept, returned = (
        subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout.split()
        for how in ("kept", "returned")
    )
    if kept[0] == "False":
        pytest.skip("another C library than glibc")
    assert int(kept[1]) < 0.1 * int(returned[1])
