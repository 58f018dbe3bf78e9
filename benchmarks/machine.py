"""What every result says of itself: the date, the machine, the versions and the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

MALLOC = {
    # A layer's weights that were just unpacked go back to the allocator, not to the kernel, which would have to fill
    # their pages with zeros again: unpacking is 7 to 8 times faster so. Set for every system alike. Not higher: what is
    # never given back adds up over several processes.
    "MALLOC_MMAP_THRESHOLD_": str(256 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


def provenance(device: str) -> dict[str, str]:
    """Date, machine, versions and commit ("+" behind it: with changes that are not committed)."""
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
    """The commit that lies here, with a plus behind it where files differ from it."""
    here = Path(__file__).parent
    line = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=here).stdout.strip()


def _processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
