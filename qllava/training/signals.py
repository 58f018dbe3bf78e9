"""Signals that end a run: between steps when it trains, so that it is saved first; at once at any other time.

| signal | sent by | status |
|---|---|---|
| SIGTERM | a preemption, a container that is stopped | 143 |
| SIGINT | Ctrl-C; a second one ends at once, without saving | 130 |
| SIGUSR1 | SLURM before the time is up (`--signal=B:USR1@300`) | 75, which schedulers read as "try again" |
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from qllava.training import processes

STATUS = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 75}


class Stopped(BaseException):
    """A signal ended the run, at a place from which the same command continues.

    No Exception, as KeyboardInterrupt is none: nothing that mends errors may swallow it.
    """

    def __init__(self, name: str, step: int | None = None) -> None:
        """Args:
        name: of the signal.
        step: the one that was saved; None when nothing was being trained.
        """
        super().__init__(name)
        self.name, self.step = name, step

    @property
    def status(self) -> int:
        """What the process ends with."""
        return STATUS[self.name]

    def __str__(self) -> str:
        where = f"saved at step {self.step} and ended" if self.step is not None else "ended"
        return f"{where} by {self.name}; the same command continues the run."


class SaveAndStop(TrainerCallback):
    """After a signal the step that is being computed is saved, and training stops; nothing is measured any more."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._stopping = False

    def ask(self, name: str) -> None:
        """Called by the signal's handler."""
        if self.name is None:
            self.name = name
            # Not print: its buffer may be just being written.
            os.write(2, f"\nqllava: {name}: the run is saved after this step and ends.\n".encode())
        if name == "SIGINT":
            # The kernel's own handling: Python's would wait for what torch is computing.
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save and stop, if a signal came."""
        if self.agree() is not None:
            self._stopping = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An epoch that ends by a signal is measured no more than a step, and its step is saved already."""
        if self._stopping:  # not `name`: in that all processes have not agreed
            control.should_save = control.should_evaluate = False

    def agree(self) -> str | None:
        """The signal that came, to whichever process: all of them stop at the same step."""
        names = list(STATUS)
        number = processes.highest(0 if self.name is None else 1 + names.index(self.name))
        if not number:
            return None  # what came since then is for the next step
        self.name = names[number - 1]
        return self.name


def leave_to_main(_: int = 0) -> None:
    """In a worker of a data loader: what is sent to all processes of a run at once is for the main one to answer.

    torch ends a run whose worker has died of a signal, before anything could be saved. The main process itself ends
    its workers by SIGTERM, and waits for them; so that one is looked at, where the system says who sent it.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # on Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_main, daemon=True).start()


def _end_with_main() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _end(name: str) -> None:
    raise Stopped(name)


@contextmanager
def handled(by: Callable[[str], None] = _end) -> Iterator[None]:
    """Let a function have the names of the signals that come; without one they end the run at once, with `Stopped`.

    In a thread beside the main one Python lets nobody handle signals; nothing is changed there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def handler(number: int, frame: Any) -> None:
        if os.getpid() == process:
            by(signal.Signals(number).name)
        elif number == signal.SIGTERM:  # a process that was forked from this one inherits the handler
            os._exit(STATUS["SIGTERM"])

    before = {name: signal.signal(getattr(signal, name), handler) for name in STATUS if hasattr(signal, name)}
    try:
        yield
    finally:
        for name, former in before.items():
            signal.signal(getattr(signal, name), former)
