"""Signals that end a run: between steps when it trains, so that it is saved first; at once at any other time.

Python runs a handler between two of its own instructions. While the main thread waits in C (for another process, a
driver, a file system) it runs none, so a second thread ends the process then, without what is cleaned up otherwise.

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

from qllava.training.durable import processes

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
        where = f"saved at step {self.step} and stopped" if self.step is not None else "stopped"
        return f"{where} by {self.name}; run the same command to resume."


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
            os.write(2, f"\nqllava: {name}: saving after this step, then stopping.\n".encode())
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


@contextmanager
def held_back() -> Iterator[None]:
    """Let signals wait while workers are started: each begins with them blocked, until `leave_to_main` has run.

    torch gives a worker a handler of its own that ends it by SIGTERM, a moment before it calls anything of ours.
    """
    names = {getattr(signal, name) for name in STATUS if hasattr(signal, name)}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, names) if hasattr(signal, "pthread_sigmask") else None
    try:
        yield
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_main() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _end(name: str) -> None:
    raise Stopped(name)


GRACE = 1.0
"""Seconds in which Python has to run the handler of a signal before the process is ended without it."""


class _Watch:
    """Ends the process if a signal comes whose handler Python cannot run."""

    def __init__(self) -> None:
        self.handled = threading.Event()
        self._numbers, self._inlet = os.pipe()
        os.set_blocking(self._inlet, False)
        # Python's handler in C writes the number of each signal here, whatever the main thread is doing.
        self._former = signal.set_wakeup_fd(self._inlet, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()

    def close(self) -> None:
        signal.set_wakeup_fd(self._former)
        os.write(self._inlet, b"\0")
        os.close(self._inlet)

    def _watch(self) -> None:
        while number := ord(os.read(self._numbers, 1) or b"\0"):
            name = signal.Signals(number).name
            if name in STATUS and not self.handled.wait(GRACE):
                os.write(2, f"qllava: {Stopped(name)}\n".encode())
                os._exit(STATUS[name])
        os.close(self._numbers)


def _leave_watching() -> None:
    """In a forked process, which has inherited the parent's pipe: its own signals are not written there."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_watching)


@contextmanager
def handled(by: Callable[[str], None] = _end) -> Iterator[None]:
    """Let a function have the names of the signals that come; without one they end the run at once, with `Stopped`.

    Without one, the run also ends within two seconds while the main thread waits in C, where Python runs no handler.

    In a thread beside the main one Python lets nobody handle signals; nothing is changed there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()
    former_inlet = signal.set_wakeup_fd(-1)  # an outer watch must not cut off a step that is being computed
    watch = _Watch() if by is _end else None

    def handler(number: int, frame: Any) -> None:
        if os.getpid() == process:
            if watch:
                watch.handled.set()
            by(signal.Signals(number).name)
        elif number == signal.SIGTERM:  # a process that was forked from this one inherits the handler
            os._exit(STATUS["SIGTERM"])

    before = {name: signal.signal(getattr(signal, name), handler) for name in STATUS if hasattr(signal, name)}
    try:
        yield
    finally:
        for name, former in before.items():
            signal.signal(getattr(signal, name), former)
        if watch:
            watch.close()
        signal.set_wakeup_fd(former_inlet)
