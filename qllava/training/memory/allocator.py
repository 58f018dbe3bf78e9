"""glibc's allocator, told to keep what a step on a CPU frees for the next one.

By default it gives large blocks back to the kernel as soon as a few of them are free; their pages are filled with zeros
when they are asked for again: the tensors of each step, and the weights of each layer that are unpacked from 4 bit.
"""

from __future__ import annotations

import ctypes
import sys

MMAP_THRESHOLD = 32 << 20
"""Bytes of the largest block that is kept; glibc takes no more than this."""
TRIM_THRESHOLD = 1 << 30
"""Bytes at the end of the heap that are kept."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> bool:
    """Set it for this process; True when it was taken. Other systems than Linux with glibc stay as they are."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    return bool(mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD))
