"""Worker processes that end with the process that started them. Without torch."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from multiprocessing.context import BaseContext


def pool(workers: int | None = None, *, start: str | None = None) -> ProcessPoolExecutor:
    """Return a pool of worker processes; none of them outlives this process, however it ends.

    Workers of the standard library's pool wait for work for ever when the process that started them is killed: each
    holds the writing end of the pipe that it reads from.

    Args:
        workers: How many; by the number of cores when not given.
        start: How `multiprocessing` starts them ("fork", "spawn"); its default when not given.
    """
    context: BaseContext = get_context(start)
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_follow)


def _follow() -> None:
    """Let a thread of a worker wait for the end of the process that started it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # the main thread waits in C and cannot be interrupted
