"""Measurement of systems in turn: each trains in its own process, and computes an optimizer step on command.

The processes wait for each other inside the real training loop (a callback at the end of a step), so a step includes
everything: reading images, collating, forward, backward, clipping, optimizer. A repetition is one step of every system
with the same samples; each repetition starts with another system.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.machine import MALLOC
from benchmarks.step import Step

QUIET = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
STOP_SECONDS = 30


class Failed(RuntimeError):
    """Error of a process that failed.

    Args:
        text: Message of the error.
        out_of_memory: Whether the memory did not suffice.
    """

    def __init__(self, text: str, out_of_memory: bool) -> None:
        super().__init__(text)
        self.out_of_memory = out_of_memory


class Worker:
    """A system in its own process; its trainer is built when the constructor returns.

    Raises:
        Failed: If the process fails, here or in any later call.
    """

    def __init__(self, job: Any) -> None:
        self.job = job
        # A server that has imported everything forks at once; CUDA does not survive a fork.
        context: Any = multiprocessing.get_context("spawn" if job.device == "cuda" else "forkserver")
        if job.device != "cuda":
            context.set_forkserver_preload(["benchmarks.serving"])
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(job, other), daemon=True)
        with mock.patch.dict(os.environ, MALLOC | QUIET):
            self._process.start()
        other.close()
        self.digest: str = self._answer()

    def step(self, *, count: bool = False) -> Step:
        """Compute the next optimizer step; with `count` its FLOPs are counted, which takes longer."""
        return self._ask("count" if count else "step")  # type: ignore[no-any-return]

    def loss(self, samples: int) -> float:
        """Return the mean loss over the learned tokens of the last `samples` samples that were trained on."""
        return self._ask(f"loss {samples}")  # type: ignore[no-any-return]

    def profile(self, path: Path) -> Step:
        """Compute the next step under torch's profiler, and write the profile as a table."""
        return self._ask(f"profile {path}")  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):  # the process has ended already
            self._pipe.send("stop")
        self._process.join(STOP_SECONDS)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()
        self._pipe.close()

    def _ask(self, command: str) -> Any:
        self._pipe.send(command)
        return self._answer()

    def _answer(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except EOFError as error:
            self._process.join()
            status = self._process.exitcode
            # Linux kills a process that takes too much memory without a message.
            raise Failed(f"The process of {self.job.system} ended with status {status}.", status == -9) from error
        if kind == "failed":
            self.close()
            raise Failed(*value)
        return value


def serve(job: Any, pipe: Connection) -> None:
    """Run a worker's process: build the system, then follow commands."""
    # Imported here: the process that starts the others does not need it.
    from benchmarks.serving import run

    try:
        run(job, pipe)
    except Exception as error:
        text = f"{job.system}: {type(error).__name__}: {error}\n{traceback.format_exc()}"
        # torch's error, and the two errors of qllava with the same meaning.
        memory = type(error).__name__ in ("OutOfMemoryError", "DoesNotFit") or "Memory does not suffice" in str(error)
        pipe.send(("failed", (text, memory)))


def interleave(workers: Sequence[Worker], repetitions: int) -> list[list[Step]]:
    """Return the steps of each worker; each repetition starts with another worker."""
    steps: list[list[Step]] = [[] for _ in workers]
    for repetition in range(repetitions):
        for place in range(len(workers)):
            number = (place + repetition) % len(workers)
            steps[number].append(workers[number].step())
    return steps
