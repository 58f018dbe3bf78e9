"""Worker processes that end with the process that started them. Without torch."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from multiprocessing.context import BaseContext


def pool(workers: int | None = None, *, start: str | None = None) -> ProcessPoolExecutor:
    """Return a pool of worker processes, which end with this process in any case.

    Workers of the standard library's pool wait for work without end if the process that started them is killed,
    because each of them holds the writing end of the pipe that it reads from.

    Args:
        workers: Number of workers; None for one per core.
        start: Start method of `multiprocessing` ("fork", "spawn"); None for its default.
    """
    context: BaseContext = get_context(start)
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_follow)


def _follow() -> None:
    """Start a thread in a worker that waits for the end of the process that started it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # the main thread waits in C and cannot be interrupted
