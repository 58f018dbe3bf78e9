"""Several processes of one run, started by accelerate: what they agree on, and what the main process does alone.

All ranks run the same code, and each computes its share of every step. Only the main process writes files and prints.
If one rank can fail, the others must learn of it, because a rank that waits for one that has ended waits forever. With
one process these functions do no more than the calls that they wrap.
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
    """Error: another rank has failed and reports the reason; this one ends silently."""


# Variables set by launchers. If they are left over in a shell, a process waits for others that nobody started.
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "WORLD_SIZE")


@contextmanager
def unlaunched() -> Iterator[None]:
    """Hide the variables of a launcher while settings are only read; accelerate would wait for the other ranks."""
    found = {name: os.environ.pop(name) for name in (*SIZES[:3], *LAUNCHED) if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(found)


@contextmanager
def meeting() -> Iterator[None]:
    """Print which processes this one waits for; they connect inside. A single process waits for none.

    torch waits in C for up to `ddp_timeout`, even for processes that were never started.

    Raises:
        InputError: The launcher's variables are incomplete, or not all processes connected in time.
    """
    found = {name: os.environ[name] for name in (*SIZES[:3], *LAUNCHED) if os.environ.get(name)}
    count = max((_number(name, found[name]) for name in SIZES if name in found), default=1)
    if not found or (count == 1 and "LOCAL_RANK" not in found) or torch.distributed.is_initialized():
        yield
        return
    alone = f"unset {', '.join(found)} to train in one process"
    missing = [name for name in ("RANK", "WORLD_SIZE") if name not in found]
    if missing and "LOCAL_RANK" in found and not any(name in found for name in SIZES[:3]):
        raise InputError(f"LOCAL_RANK is set without {' and '.join(missing)}. Start the run with torchrun, or {alone}.")
    at = f"{found.get('MASTER_ADDR', '127.0.0.1')}:{found.get('MASTER_PORT', '29500')}"
    # Under torch's launcher rank 0 prints it for all; otherwise the others may not exist, and each prints it.
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
    """Return whether this run has more than one process."""
    return bool(PartialState().num_processes > 1)


def is_main() -> bool:
    """Return whether this is the process that writes files."""
    return bool(PartialState().is_main_process)


def speaks() -> bool:
    """Return whether this is the main process, without waiting; also before the processes are connected."""
    return os.environ.get("RANK", "0") == "0"


def share() -> tuple[int, int]:
    """Return this process's rank and the world size."""
    state = PartialState()
    return int(state.process_index), int(state.num_processes)


def fsdp_asked() -> bool:
    """Return whether accelerate is configured for FSDP; without a GPU it ignores that silently."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def highest(value: int) -> int:
    """Return the largest value over all ranks."""
    if not several():
        return value
    mine = torch.tensor([value], device=PartialState().device)
    return int(gather(mine).max())


def lowest(value: int) -> int:
    """Return the smallest value over all ranks."""
    return -highest(-value)


def mean(value: float) -> float:
    """Return the mean over all ranks; not finite if one of the values is not."""
    if not several():
        return value
    return float(gather(torch.tensor([value], device=PartialState().device)).mean())


def total(values: list[float]) -> list[float]:
    """Return the sum of each value over all ranks."""
    if not several():
        return values
    mine = torch.tensor([values], dtype=torch.float64, device=PartialState().device)
    summed: list[float] = gather(mine).sum(0).tolist()
    return summed


def every(values: list[T]) -> list[T]:
    """Return the values of all ranks, rank by rank."""
    found: list[T] = gather_object(values) if several() else values
    return found


@contextmanager
def together() -> Iterator[None]:
    """End all ranks if one fails inside: that one with its error, the others with `Elsewhere`.

    Nothing inside may wait for another rank.
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
    """Call a function on the main process only, and return its result on all ranks."""
    found: list[T | None] = [None]
    with together():
        if is_main():
            found = [call()]
    if several():
        broadcast_object_list(found)
    return found[0]  # type: ignore[return-value]


def main_first(call: Callable[[], T]) -> T:
    """Call a function on all ranks; on each machine one goes first, and the others find what it cached on the disk."""
    first = bool(PartialState().is_local_main_process)
    found: list[T] = []
    for turn in (True, False):
        with together():
            if first == turn:
                found.append(call())
    return found[0]


@contextmanager
def one_voice() -> Iterator[None]:
    """Silence the output of all processes but the main one, and disconnect the processes at the end."""
    if is_main():
        yield
    else:
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            yield
    if several():
        PartialState().destroy_process_group()
