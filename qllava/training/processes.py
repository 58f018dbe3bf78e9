"""Several processes of one run, which accelerate started: what they agree on, and what the main one does alone.

All go through the same code, and each computes its share of every step. The main process alone writes files and
speaks to people. Where one of them could fail, the others have to hear of it: a process that waits for one that has
ended waits for ever. With one process nothing here does more than the call that it wraps.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather, gather_object

from qllava.config import InputError

T = TypeVar("T")


class Elsewhere(InputError):
    """Another process has failed and says why; this one ends with it, and has nothing to say."""


def several() -> bool:
    """Whether this run has more than one process."""
    return bool(PartialState().num_processes > 1)


def is_main() -> bool:
    """Whether this is the process that writes."""
    return bool(PartialState().is_main_process)


def share() -> tuple[int, int]:
    """This process's number, from 0, and how many there are."""
    state = PartialState()
    return int(state.process_index), int(state.num_processes)


def fsdp_asked() -> bool:
    """Whether accelerate was told to share out the model; without a GPU it does not, and says nothing."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def highest(value: int) -> int:
    """The largest of all processes' values."""
    if not several():
        return value
    mine = torch.tensor([value], device=PartialState().device)
    return int(gather(mine).max())


def lowest(value: int) -> int:
    """The smallest of all processes' values."""
    return -highest(-value)


def mean(value: float) -> float:
    """The mean over all processes; not finite where one of them is not."""
    if not several():
        return value
    return float(gather(torch.tensor([value], device=PartialState().device)).mean())


def total(values: list[float]) -> list[float]:
    """The sum of each value over all processes."""
    if not several():
        return values
    mine = torch.tensor([values], dtype=torch.float64, device=PartialState().device)
    summed: list[float] = gather(mine).sum(0).tolist()
    return summed


def every(values: list[T]) -> list[T]:
    """The values of all processes, one process after the other."""
    found: list[T] = gather_object(values) if several() else values
    return found


@contextmanager
def together() -> Iterator[None]:
    """What fails in one process ends all of them here, with its error in that one and `Elsewhere` in the others.

    Nothing inside may wait for another process.
    """
    problem: InputError | OSError | None = None
    try:
        yield
    except (InputError, OSError) as error:
        problem = error
    index, count = share()
    failed = highest(0 if problem is None else count - index)
    if problem is not None and failed == count - index:
        raise problem
    if failed:
        raise Elsewhere(f"Process {count - failed} has ended.") from problem


def by_main(call: Callable[[], T]) -> T:
    """Called in the main process alone; all of them get what it returns."""
    found: list[T | None] = [None]
    with together():
        if is_main():
            found = [call()]
    if several():
        broadcast_object_list(found)
    return found[0]  # type: ignore[return-value]


def main_first(call: Callable[[], T]) -> T:
    """Called in all processes, on each machine in one before the others, which find what it has kept on the disk."""
    first = bool(PartialState().is_local_main_process)
    found: list[T] = []
    for turn in (True, False):
        with together():
            if first == turn:
                found.append(call())
    return found[0]


@contextmanager
def one_voice() -> Iterator[None]:
    """What is printed in other processes than the main one is not shown; and the processes part at the end."""
    if is_main():
        yield
    else:
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            yield
    if several():
        PartialState().destroy_process_group()
