"""Settings of glibc's allocator that keep the memory a CPU step frees for the next step.

By default glibc returns large blocks to the kernel as soon as a few of them are free, and the kernel fills their pages
with zeros when they are allocated again. That concerns the tensors of each step, and the weights of each layer that are
dequantized from 4 bit.
"""

from __future__ import annotations

import ctypes
import sys

MMAP_THRESHOLD = 32 << 20
"""Largest block that is kept, in bytes; also the largest value that glibc accepts."""
TRIM_THRESHOLD = 1 << 30
"""Free memory at the end of the heap that is kept, in bytes."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> bool:
    """Apply the settings to this process; return whether they took effect, which needs Linux with glibc."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    return bool(mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD))
