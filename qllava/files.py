"""Locks, and folders that are written aside and renamed: two processes must not damage each other's files.

A lock is a hidden file that the kernel locks for one process and frees when that process ends, however it ends. The
file next to it, `.holder`, names the host and the process id, for the sentence that another process is refused with.

On network file systems the kernel's lock holds between machines where the server has locks (NFS from version 4, Lustre
with `flock`). Where there are none the program continues without a lock, and says so on stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from qllava.config import InputError

LOCK_FILE = ".lock"
HOLDER_FILE = ".holder"
HIDDEN = (LOCK_FILE, HOLDER_FILE)
"""What a lock leaves in a locked folder while it is held."""
_WAIT = 1.0
"""Seconds to wait for a process that is just ending."""


@contextmanager
def made_once(folder: Path, is_whole: Callable[[Path], bool] = Path.is_dir) -> Iterator[Path]:
    """Yield a new folder next to `folder` and rename it to `folder` at the end; remove it after an error.

    Several processes may make the same folder at the same time: the first one that is whole stays.

    Args:
        folder: What is made; its parents are made too.
        is_whole: Whether a folder of that name is complete; one that is not is replaced.

    Raises:
        OSError: It cannot be written.
    """
    aside = folder.parent / f".{folder.name}.{platform.node()}.{os.getpid()}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        if not is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
            try:
                aside.rename(folder)
            except OSError:
                if not is_whole(folder):
                    raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def locked_folder(folder: Path, advice: str) -> Iterator[None]:
    """Hold a folder for this process; the folder must exist.

    Args:
        folder: What is locked.
        advice: What the user can do if another process holds it; the end of the sentence.

    Raises:
        InputError: Another process holds it. The sentence names its host and process id.
    """
    lock = Lock(folder / LOCK_FILE, folder / HOLDER_FILE)
    lock.take(str(folder), advice)
    try:
        yield
    finally:
        lock.free()


def unwritable(path: Path, error: OSError) -> InputError:
    """Return the error for a file that cannot be written."""
    return InputError(f"{path} cannot be written ({error.strerror}); make room, or choose another place.")


class Lock:
    """A lock that one process holds at a time. Forked children do not hold it."""

    def __init__(self, path: Path, holder: Path) -> None:
        """Args:
        path: The file that is locked.
        holder: The file that says who holds it.
        """
        self.path, self._holder = path, holder
        # Soft locks are files that a killed process leaves behind; then rather none.
        self._lock = FileLock(path, fallback_to_soft=False, thread_local=False)
        self._file: os.stat_result | None = None

    def take(self, what: str, advice: str) -> None:
        """Take the lock, or say on stderr that this file system has none.

        Args:
            what: What is in use, for the sentence.
            advice: What the user can do about it.

        Raises:
            InputError: Another process holds the lock.
            OSError: The file cannot be made.
        """
        self.path.parent.stat()  # or filelock would make it
        try:
            self._lock.acquire(timeout=_WAIT)
        except Timeout as error:
            raise InputError(f"{what} is in use by {self._who()}; {advice}.") from error
        except OSError as error:
            if isinstance(error, PermissionError | FileNotFoundError | IsADirectoryError) or not self.path.exists():
                raise
            print(
                f"qllava: {what} cannot be locked ({error.strerror or error}): do not start a second process on it.",
                file=sys.stderr,
            )
            return
        except NotImplementedError:
            print(f"qllava: {what} cannot be locked: do not start a second process on it.", file=sys.stderr)
            return
        with contextlib.suppress(OSError):
            self._file = self.path.stat()
            self._holder.write_text(json.dumps({"host": platform.node(), "pid": os.getpid()}), encoding="utf-8")

    def free(self) -> None:
        """Free the lock and remove its files, unless somebody has put others in their place."""
        if not self._lock.is_locked:
            return
        # Before the lock is freed: afterwards they may be the next holder's.
        with contextlib.suppress(OSError):
            if self._is_own():
                self._holder.unlink(missing_ok=True)
                self.path.unlink()
        self._lock.release()

    def _is_own(self) -> bool:
        """Whether the file at the path is still the one that is locked; somebody may have deleted and remade it."""
        return self._file is not None and os.path.samestat(self._file, self.path.stat())

    def _who(self) -> str:
        found = self._read()
        return f"process {found[1]} on {found[0]}" if found else "another process"

    def _read(self) -> tuple[str, int] | None:
        try:
            read = json.loads(self._holder.read_text(encoding="utf-8"))
            return str(read["host"]), int(read["pid"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
