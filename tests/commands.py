"""Commands in their own processes, forked from a process that has already imported the libraries.

Importing torch, transformers, TRL and peft takes longer than most commands whose files, exit status or reaction to a
signal are tested. `start` runs `python WORDS` without these imports: `tests.fork_server` imports the libraries, but
nothing of this repository, once for each test process, and is forked for each command. A command has its own arguments,
environment, folder, output and session, imports qllava itself, and ends as any program does.

Tests of what is imported when, and of what a library reads from the environment at import (OMP_NUM_THREADS is 1 here,
PYTHONIOENCODING is ignored), use processes that start from nothing instead.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
_RUNNING: list[Command] = []


class Command:
    """A running command, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, words: list[str], cwd: Path, env: Mapping[str, str], out: Path | None, together: bool) -> None:
        self.returncode: int | None = None
        self._out: IO[bytes] = out.open("w+b") if out else tempfile.TemporaryFile()  # noqa: SIM115  closed in wait
        self._err: IO[bytes] = self._out if together else tempfile.TemporaryFile()  # noqa: SIM115
        self._texts: dict[IO[bytes], str] = {}  # of a command that has ended
        self._status, status = os.pipe()
        message = json.dumps({"words": words, "cwd": str(cwd), "env": dict(env)}).encode()
        socket.send_fds(_server()[0], [message], [self._out.fileno(), self._err.fileno(), status])
        os.close(status)
        self._said = b""
        self._hear(1, None)
        self.pid = int(self._said.split(b"\n")[0])
        _RUNNING.append(self)

    def _hear(self, lines: int, seconds: float | None) -> bool:
        """Read lines of the watcher (the process id, then the status); return False if the time is over."""
        until = None if seconds is None else time.monotonic() + seconds
        while self._said.count(b"\n") < lines:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not select.select([self._status], [], [], left)[0]:
                return False
            found = os.read(self._status, 100)
            assert found, "the process that is forked for commands has ended"
            self._said += found
        return True

    def poll(self) -> int | None:
        """Return the exit status, the negative number of a signal, or None while the command runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the command, and return its exit status."""
        if self.returncode is None:
            if not self._hear(2, timeout):
                raise subprocess.TimeoutExpired("command", timeout or 0.0)
            self.returncode = int(self._said.split(b"\n")[1])
            os.close(self._status)
            self._texts = {file: _read(file) for file in (self._out, self._err)}
            for file in self._texts:
                file.close()
            _RUNNING.remove(self)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end, and return stdout and stderr; with `together` stdout holds both."""
        self.wait(timeout)
        return self.stdout(), "" if self._err is self._out else self.stderr()

    def stdout(self) -> str:
        """Return what the command has printed on stdout so far."""
        return self._texts.get(self._out) or _read(self._out)

    def stderr(self) -> str:
        """Return what the command has printed on stderr so far."""
        return self._texts.get(self._err) or _read(self._err)

    def send_signal(self, number: int) -> None:
        """Send a signal if the command still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM if the command still runs."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL if the command still runs."""
        self.send_signal(signal.SIGKILL)


def _read(file: IO[bytes]) -> str:
    return "" if file.closed else os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode("utf-8", "replace")


def start(
    *words: str | Path,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    out: Path | None = None,
    together: bool = False,
) -> Command:
    """Start `python WORDS` in its own session.

    Args:
        words: Script or `-m MODULE` or `-c CODE`, and its arguments.
        cwd: Working folder.
        env: Whole environment; by default this process's, with the clone on PYTHONPATH.
        out: File for stdout; by default a temporary file.
        together: Whether stderr goes to the same file as stdout.
    """
    given = {**os.environ, "PYTHONPATH": str(ROOT)} if env is None else env
    return Command([str(word) for word in words], cwd, given, out, together)


def run(*words: str | Path, timeout: float = 300, **how: object) -> subprocess.CompletedProcess[str]:
    """Start a command as `start` does, wait for its end, and return its status and output."""
    command = start(*words, **how)  # type: ignore[arg-type]
    try:
        out, err = command.communicate(timeout)
    finally:
        command.kill()
    assert command.returncode is not None
    return subprocess.CompletedProcess([str(word) for word in words], command.returncode, out, err)


def without_clone() -> dict[str, str]:
    """Return an environment in which nothing of this clone is on Python's path."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def interpreter() -> Path:
    """Return a program that replaces `python` where a command starts other processes, so that these are forked too."""
    return _server()[2] / "python"


@cache
def _server() -> tuple[socket.socket, subprocess.Popen[bytes], Path]:
    """Start the process that is forked; return the socket for requests, the process, and its folder."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    place = Path(tempfile.mkdtemp(prefix="forked-"))
    here, name = Path(__file__).parent, place / "socket"
    stand_in = place / "python"
    stand_in.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{here / "forked_python.py"}" "{name}" "$@"\n')
    stand_in.chmod(0o700)
    with its, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as others:
        others.bind(str(name))
        others.listen()
        given = [its.fileno(), others.fileno()]
        program = [sys.executable, str(here / "fork_server.py"), *map(str, given)]
        environment = {**without_clone(), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            program, env=environment, pass_fds=given, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
    return ours, process, place


def end() -> None:
    """Stop all commands that still run, and the process that is forked, at the end of the tests."""
    for command in list(_RUNNING):
        command.kill()
        command.wait()
    if _server.cache_info().currsize:
        client, process, place = _server()
        client.close()
        process.wait()
        shutil.rmtree(place)
