"""Signals that end a run: between steps during training, so that it is saved first, and at once at any other time.

Python runs a handler between two of its own instructions. While the main thread waits in C (for another process, a
driver, a file system) it runs none, so a second thread ends the process in that case, without the usual cleanup.

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
    """Exception: a signal ended the run, and the same command resumes it.

    Like KeyboardInterrupt this is not an Exception, so that no error handling catches it.
    """

    def __init__(self, name: str, step: int | None = None) -> None:
        """Describe the end.

        Args:
            name: Name of the signal.
            step: The step that was saved; None if nothing was being trained.
        """
        super().__init__(name)
        self.name, self.step = name, step

    @property
    def status(self) -> int:
        """Exit status of the process."""
        return STATUS[self.name]

    def __str__(self) -> str:
        where = f"saved at step {self.step} and stopped" if self.step is not None else "stopped"
        return f"{where} by {self.name}; run the same command to resume."


class SaveAndStop(TrainerCallback):
    """After a signal, saves the current step and stops the training without any further evaluation."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._stopping = False

    def ask(self, name: str) -> None:
        """Request the stop; called by the signal's handler."""
        if self.name is None:
            self.name = name
            # Not print: the signal may have interrupted a write to its buffer.
            os.write(2, f"\nqllava: {name}: saving after this step, then stopping.\n".encode())
        if name == "SIGINT":
            # The kernel's default action: Python's handler would wait for what torch is computing.
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save and stop if a signal came."""
        if self.agree() is not None:
            self._stopping = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Skip evaluation and saving at the end of an epoch that a signal ended; its last step is saved."""
        if self._stopping:  # not `name`, on which the ranks have not agreed
            control.should_save = control.should_evaluate = False

    def agree(self) -> str | None:
        """Return the signal that came to any rank, so that all ranks stop at the same step; None if there was none."""
        names = list(STATUS)
        number = processes.highest(0 if self.name is None else 1 + names.index(self.name))
        if not number:
            return None  # a signal since then counts for the next step
        self.name = names[number - 1]
        return self.name


def leave_to_main(_: int = 0) -> None:
    """Ignore, in a worker of a data loader, signals that are sent to all processes of a run: the main process answers.

    torch ends a run if a worker dies of a signal, before anything could be saved. The main process itself ends its
    workers with SIGTERM, and waits for them; so the sender of SIGTERM is checked, if the system reports it.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # on Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_main, daemon=True).start()


@contextmanager
def held_back() -> Iterator[None]:
    """Block signals while workers are started: each starts with them blocked, until `leave_to_main` has run.

    torch gives a worker its own SIGTERM handler, which ends it, shortly before it calls our code.
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
"""Seconds that Python has to run a signal's handler before the process is ended without it."""


class _Watch:
    """Watcher that ends the process if Python cannot run the handler of a signal."""

    def __init__(self) -> None:
        self.handled = threading.Event()
        self._numbers, self._inlet = os.pipe()
        os.set_blocking(self._inlet, False)
        # Python's C handler writes the number of each signal here, whatever the main thread is doing.
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
    """Stop using the parent's pipe, which a forked process inherits, for this process's own signals."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_watching)


@contextmanager
def handled(by: Callable[[str], None] = _end) -> Iterator[None]:
    """Call `by` with the name of each signal; by default a signal ends the run at once with `Stopped`.

    By default the run also ends within two seconds if the main thread waits in C, where Python runs no handler. Python
    allows signal handlers in the main thread only; in any other thread nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()
    former_inlet = signal.set_wakeup_fd(-1)  # an outer watcher must not interrupt the current step
    watch = _Watch() if by is _end else None

    def handler(number: int, frame: Any) -> None:
        if os.getpid() == process:
            if watch:
                watch.handled.set()
            by(signal.Signals(number).name)
        elif number == signal.SIGTERM:  # in a process forked from this one, which inherits the handler
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
