"""Faults that tests plant from outside: at a file operation, which Python announces before it is done.

    with planted("rename", "*/checkpoint-1", full):
        save()                                      # OSError: No space left on device, when checkpoint-1 gets its name

No function is replaced, so the same test holds when the code that writes is written otherwise. The announcements are
Python's audit events (`sys.addaudithook`). What a library writes without Python (safetensors' weights) has none, but
the folder that it is written into has, and the mode that it gets afterwards.
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
    """What the system says where a disk is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupted() -> None:
    """Ctrl-C."""
    raise KeyboardInterrupt


def killed() -> None:
    """The process ends at once, and nothing of it runs."""
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def planted(operation: Operation, pattern: str, happens: Callable[[], None]) -> Iterator[None]:
    """While it lasts, let a fault happen at each such operation on a path of that pattern ("*" also stands for "/").

    A rename counts for the name that is given. The test fails where the fault never happened.
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
    """Once for the process: a hook cannot be taken away."""
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
