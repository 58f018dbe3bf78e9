"""Several processes of one run, which accelerate started: what they agree on, and what the main one does alone.

All go through the same code, and each computes its share of every step. The main process alone writes files and
speaks to people. Where one of them could fail, the others have to hear of it: a process that waits for one that has
ended waits for ever. With one process nothing here does more than the call that it wraps.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather, gather_object

from qllava.config import InputError
from qllava.models.errors import one_line

T = TypeVar("T")


class Elsewhere(InputError):
    """Another process has failed and says why; this one ends with it, and has nothing to say."""


# Variables that launchers set. Left over in a shell, they make a process wait for others that nobody started.
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "WORLD_SIZE")


@contextmanager
def unlaunched() -> Iterator[None]:
    """Hide what a launcher has set, for settings that are only read: accelerate would wait for the other processes."""
    found = {name: os.environ.pop(name) for name in (*SIZES[:3], *LAUNCHED) if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(found)


@contextmanager
def meeting() -> Iterator[None]:
    """Say which processes this one waits for; they find each other inside. A process that is alone waits for none.

    torch waits in C for up to `ddp_timeout`, even for processes that were never started.

    Raises:
        InputError: What a launcher has set is incomplete, or not all processes came in time.
    """
    found = {name: os.environ[name] for name in (*SIZES[:3], *LAUNCHED) if os.environ.get(name)}
    count = max((_number(name, found[name]) for name in SIZES if name in found), default=1)
    if not found or (count == 1 and "LOCAL_RANK" not in found) or torch.distributed.is_initialized():
        yield
        return
    alone = f"unset {', '.join(found)} to train in one process"
    missing = [name for name in ("RANK", "WORLD_SIZE") if name not in found]
    if missing and "LOCAL_RANK" in found and not any(name in found for name in SIZES[:3]):
        raise InputError(
            f"LOCAL_RANK is set, but {' and '.join(missing)} not. Start the run with torchrun, or {alone}."
        )
    at = f"{found.get('MASTER_ADDR', '127.0.0.1')}:{found.get('MASTER_PORT', '29500')}"
    # Under torch's launcher rank 0 says it for all; otherwise the others may not exist, and each says it.
    if count > 1 and ("TORCHELASTIC_RUN_ID" not in os.environ or found.get("RANK") == "0"):
        because = next(f"{name}={found[name]}" for name in SIZES if found.get(name) == str(count))
        print(
            f"qllava: waiting for {count} processes at {at} (including this one), because {because} is set; {alone}.",
            file=sys.stderr,
            flush=True,
        )
    try:
        yield
    except torch.distributed.DistError as error:
        raise InputError(
            f"The {count} processes of this run did not connect at {at} ({one_line(error)}). Start all of "
            f"them, or {alone}."
        ) from error


def _number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise InputError(f"{name} is {text!r}, but must be a number. Unset {name} to train in one process.") from error


def several() -> bool:
    """Whether this run has more than one process."""
    return bool(PartialState().num_processes > 1)


def is_main() -> bool:
    """Whether this is the process that writes."""
    return bool(PartialState().is_main_process)


def speaks() -> bool:
    """Whether this is the main process, also before the processes have found each other: asking does not wait."""
    return os.environ.get("RANK", "0") == "0"


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
