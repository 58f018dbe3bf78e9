"""Faults that tests plant at a file operation, which Python announces before it is done.

    with planted("rename", "*/checkpoint-1", full):
        save()                                      # OSError: No space left on device, when checkpoint-1 gets its name

No function is replaced, so the test does not depend on how the code writes files. The announcements are Python's audit
events (`sys.addaudithook`). What a library writes without Python (safetensors' weights) has none, but creating its
folder and setting its mode afterwards do.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cache
from typing import Any, Literal

Operation = Literal["read", "write", "rename", "mkdir", "chmod"]
_EVENTS = {"os.rename": "rename", "os.mkdir": "mkdir", "os.chmod": "chmod"}
_planted: list[Callable[[str, str], None]] = []


def full() -> None:
    """Raise the error of the system for a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupted() -> None:
    """Raise what Ctrl-C raises."""
    raise KeyboardInterrupt


def killed() -> None:
    """Kill this process at once, without any cleanup."""
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def planted(operation: Operation, pattern: str, happens: Callable[[], None]) -> Iterator[None]:
    """Plant a fault at each operation of a kind on paths that match a pattern, inside a `with` block.

    The test fails if the fault never happened.

    Args:
        operation: Kind of the operation; a rename matches by its new name.
        pattern: Pattern of `fnmatch`, in which "*" also matches "/".
        happens: Function that is called before the operation.
    """
    _listen()
    times = 0

    def at(found: str, path: str) -> None:
        nonlocal times
        if found == operation and fnmatch(path, pattern):
            times += 1
            happens()

    _planted.append(at)
    try:
        yield
    finally:
        _planted.remove(at)
        assert times, f"nothing did {operation} {pattern}"


@cache
def _listen() -> None:
    """Add the hook, once for the process, because a hook cannot be removed."""
    sys.addaudithook(_heard)


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    if not _planted:
        return
    if event == "open":
        path, _, flags = arguments
        operation = "write" if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR) else "read"
    elif event in _EVENTS:
        operation, path = _EVENTS[event], arguments[event == "os.rename"]
    else:
        return
    if isinstance(path, str | bytes | os.PathLike):
        for at in tuple(_planted):
            at(operation, os.fsdecode(path))
