"""Systems take turns: each trains in a process of its own, and computes its next optimizer step when it is told to.

The processes wait for each other inside the real training loop (a callback at the end of a step), so a step is all of
it: reading images, collating, forward, backward, clipping, optimizer. A repetition is one step of every system, with
the same samples; they begin it in turn.
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
    """A process ended with an error.

    out_of_memory: whether it was that.
    """

    def __init__(self, text: str, out_of_memory: bool) -> None:
        super().__init__(text)
        self.out_of_memory = out_of_memory


class Worker:
    """A system in a process of its own; it has built its trainer when this returns.

    Raises Failed when it could not be built, here or at any later call.
    """

    def __init__(self, job: Any) -> None:
        self.job = job
        # A server that has imported everything forks in no time; CUDA does not survive a fork.
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
        """The next optimizer step; `count`: with its FLOPs, which takes longer."""
        return self._ask("count" if count else "step")  # type: ignore[no-any-return]

    def loss(self, samples: int) -> float:
        """Mean loss over the learned tokens of the last samples that were trained on."""
        return self._ask(f"loss {samples}")  # type: ignore[no-any-return]

    def profile(self, path: Path) -> Step:
        """The next step under torch's profiler; its table is written to a file."""
        return self._ask(f"profile {path}")  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):  # it has ended already
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
            # Linux ends a process that takes too much memory without a word.
            raise Failed(f"the process of {self.job.system} ended with status {status}", status == -9) from error
        if kind == "failed":
            self.close()
            raise Failed(*value)
        return value


def serve(job: Any, pipe: Connection) -> None:
    """What a process does: build, and then as it is told."""
    # Imported here: the process that starts the others holds no model.
    from benchmarks.serving import run

    try:
        run(job, pipe)
    except Exception as error:
        text = f"{job.system}: {type(error).__name__}: {error}\n{traceback.format_exc()}"
        # torch's own error, and the two in which qllava says the same.
        memory = type(error).__name__ in ("OutOfMemoryError", "DoesNotFit") or "Memory does not suffice" in str(error)
        pipe.send(("failed", (text, memory)))


def interleave(workers: Sequence[Worker], repetitions: int) -> list[list[Step]]:
    """For each worker its steps; in each repetition another one begins."""
    steps: list[list[Step]] = [[] for _ in workers]
    for repetition in range(repetitions):
        for place in range(len(workers)):
            number = (place + repetition) % len(workers)
            steps[number].append(workers[number].step())
    return steps
