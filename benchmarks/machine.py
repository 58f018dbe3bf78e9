"""Origin of a result: the date, the machine, the versions and the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from qllava.training.memory.allocator import MMAP_THRESHOLD, TRIM_THRESHOLD

MALLOC = {
    # What qllava sets for itself on a CPU, here for every system alike: a layer's unpacked weights return to the
    # allocator and not to the kernel, which would have to fill their pages with zeros again.
    "MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD),
    "MALLOC_TRIM_THRESHOLD_": str(TRIM_THRESHOLD),
}


def provenance(device: str) -> dict[str, str]:
    """Return the date, the machine, the versions and the commit (ending in "+" if there are uncommitted changes)."""
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        machine = f"{found.name}, {found.total_memory / 2**30:.0f} GiB"
    else:
        machine = f"{_processor()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    names = ("torch", "transformers", "trl", "peft", "bitsandbytes")
    return {
        "date": date.today().isoformat(),
        "machine": machine,
        "versions": ", ".join(f"{name} {version(name)}" for name in names),
        "commit": commit(),
    }


def commit() -> str:
    """Return the commit that is checked out, followed by "+" if files differ from it."""
    here = Path(__file__).parent
    line = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=here).stdout.strip()


def _processor() -> str:
    """Return the processor's name, or its architecture if the system does not report a name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
