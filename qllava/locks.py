"""Locks, with which one process at a time writes to a folder or a file. Without torch.

A lock is a hidden file that the kernel locks for one process and frees when that process ends in any way. The file next
to it, `.holder`, contains the host and the process id, for the message to another process that wants the lock.

On network file systems the lock works between machines if the server supports locks (NFS from version 4, Lustre with
`flock`). Without support the program continues without a lock, and prints that on stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from qllava.config import InputError

LOCK_FILE = ".lock"
HOLDER_FILE = ".holder"
HIDDEN = (LOCK_FILE, HOLDER_FILE)
"""Files of a lock in a locked folder while it is held."""
_WAIT = 1.0
"""Seconds to wait for a process that is about to end."""


@contextmanager
def locked_folder(folder: Path, advice: str) -> Iterator[None]:
    """Hold a folder for this process; the folder must exist.

    Args:
        folder: Folder to lock.
        advice: What the user can do if another process holds it, as the end of the message.

    Raises:
        InputError: Another process holds the folder; the message names its host and process id.
    """
    lock = Lock(folder / LOCK_FILE, folder / HOLDER_FILE)
    lock.take(str(folder), advice)
    try:
        yield
    finally:
        lock.free()


def refuse_held(folder: Path, advice: str) -> None:
    """Raise InputError as `locked_folder` does, without taking the lock and without creating files."""
    lock = _kernels(folder / LOCK_FILE)
    if not (folder / LOCK_FILE).is_file():
        return
    try:
        lock.acquire(timeout=_WAIT)
    except Timeout as error:
        who = Lock(folder / LOCK_FILE, folder / HOLDER_FILE).who()
        raise InputError(f"{folder} is in use by {who}; {advice}.") from error
    except (OSError, NotImplementedError):  # `take` reports it
        return
    lock.release()


def hold_file(path: Path, seconds: float) -> FileLock | None:
    """Lock a file itself, so that other processes are kept out under any name (hard link) of the file.

    Args:
        path: The file; it must exist.
        seconds: Seconds to wait for another process; below 0 without limit.

    Returns:
        The lock, which the caller must release; None on a file system without locks.

    Raises:
        filelock.Timeout: Another process holds the file.
    """
    real = path.resolve()
    # On Windows a lock prevents its holder from reading the file too, so a hidden file is locked there.
    lock = _kernels(real if os.name == "posix" else real.with_name(f".{real.name}.writing"))
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        raise
    except (OSError, NotImplementedError):
        return None
    return lock


def _kernels(path: Path) -> FileLock:
    # No soft locks: they are files that a killed process leaves behind.
    return FileLock(path, fallback_to_soft=False, thread_local=False)


class Lock:
    """A lock that one process holds at a time. Forked children do not hold it."""

    def __init__(self, path: Path, holder: Path) -> None:
        """Create a lock that is not taken yet.

        Args:
            path: File to lock.
            holder: File for the host and process id of the holder.
        """
        self.path, self._holder = path, holder
        self._lock = _kernels(path)
        self._file: os.stat_result | None = None

    @classmethod
    def beside(cls, path: Path) -> Lock:
        """Return the lock of a file: hidden files next to it, so that deleting it does not let a second process in."""
        real = path.resolve()  # the same file for every symbolic link to it
        return cls(real.with_name(f".{real.name}{LOCK_FILE}"), real.with_name(f".{real.name}{HOLDER_FILE}"))

    def take(self, what: str, advice: str) -> None:
        """Take the lock, or print on stderr that this file system has no locks.

        Args:
            what: Name of what is locked, for the message.
            advice: What the user can do if it is in use, as the end of the message.

        Raises:
            InputError: Another process holds the lock.
            OSError: The file cannot be created.
        """
        self.path.parent.stat()  # raises if the folder is missing, which filelock would create
        try:
            self._lock.acquire(timeout=_WAIT)
        except Timeout as error:
            raise InputError(f"{what} is in use by {self.who()}; {advice}.") from error
        except OSError as error:
            if isinstance(error, PermissionError | FileNotFoundError | IsADirectoryError) or not self.path.exists():
                raise
            print(
                f"qllava: warning: {what} cannot be locked ({error.strerror or error}). The command continues; do not "
                "start a second process on it.",
                file=sys.stderr,
            )
            return
        except NotImplementedError:
            print(
                f"qllava: warning: {what} cannot be locked (this system has no file locks). The command continues; do "
                "not start a second process on it.",
                file=sys.stderr,
            )
            return
        with contextlib.suppress(OSError):
            self._file = self.path.stat()
            self._holder.write_text(json.dumps({"host": platform.node(), "pid": os.getpid()}), encoding="utf-8")

    def free(self) -> None:
        """Free the lock and remove its files, unless they were replaced by others."""
        if not self._lock.is_locked:
            return
        # Before the lock is freed, because afterwards they may belong to the next holder.
        with contextlib.suppress(OSError):
            if self._is_own():
                self._holder.unlink(missing_ok=True)
                self.path.unlink()
        self._lock.release()

    def _is_own(self) -> bool:
        """Return whether the file at the path is still the locked one; it may have been deleted and created again."""
        return self._file is not None and os.path.samestat(self._file, self.path.stat())

    def who(self) -> str:
        """Return the holder of the lock, for a message."""
        found = self._read()
        return f"process {found[1]} on {found[0]}" if found else "another process"

    def _read(self) -> tuple[str, int] | None:
        try:
            read = json.loads(self._holder.read_text(encoding="utf-8"))
            return str(read["host"]), int(read["pid"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
