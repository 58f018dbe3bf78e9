"""Writing of files, complete or not at all, or line by line. Without torch.

- `whole_file`, `whole_folder`: written under a temporary name in the same folder, flushed to the disk, renamed. A
  reader sees the old content or the new one. Temporary files of a killed process are removed by a later process on the
  same machine.
- `Journal`: a file of lines that is only appended to; a truncated end is repaired.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import itertools
import json
import os
import platform
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from qllava.config import InputError
from qllava.locks import hold_file

_ASIDE = ".partial"
_MANY = 256
"""Number of files in a folder above which the whole disk is flushed at once: one file alone takes milliseconds."""
_PIECE = 1 << 20
"""Number of bytes that are copied at a time."""
_RUST = re.compile(r"\(os error (\d+)\)")
"""Number of an operating system error in messages of libraries that are written in Rust."""
_OPEN = os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0)

_numbers = itertools.count()
_own: set[Path] = set()
"""Temporary paths that this process is writing to."""
_swept: set[Path] = set()
"""Folders that this process has searched for temporary files of killed processes."""


@contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a path next to `path` to write to, and rename it to `path` at the end; remove it after an error.

    Args:
        path: The file; a link is followed. A device or a pipe is written directly.
        durable: Whether to flush it to the disk before it is renamed. Otherwise a power failure may leave an empty
            file of this name.

    Raises:
        OSError: The file cannot be written; an earlier file is unchanged.
    """
    real = path.resolve()
    if real.exists() and not real.is_file() and not real.is_dir():
        yield real
        return
    with aside(real) as other:
        yield other
        move(other, real, durable=durable)


def write_whole(path: Path, text: str) -> None:
    """Write a small file, complete or not at all.

    Raises:
        OSError: The file cannot be written; an earlier file is unchanged.
    """
    with whole_file(path) as other:
        other.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any | None:
    """Return the content of a JSON file; None if it is missing or corrupt."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextmanager
def whole_folder(folder: Path, is_whole: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Yield a new folder next to `folder` and rename it to `folder` at the end; remove it after an error.

    Args:
        folder: Folder to create, with its parents.
        is_whole: Check for a complete folder, for one that several processes may create at the same time: the first
            complete one stays, an incomplete one is replaced. None: an existing folder must be empty.

    Raises:
        OSError: The folder cannot be written, or it exists and is not empty.
    """
    with aside(folder) as other:
        other.mkdir(parents=True)
        yield other
        if is_whole is None:
            if folder.exists():
                folder.rmdir()  # renaming onto an existing folder does not work everywhere
            move(other, folder)
        elif not is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
            try:
                move(other, folder)
            except OSError:
                if not is_whole(folder):
                    raise


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path` to write to and then to `move`; it is removed at the end if it exists.

    The name contains the machine and the process, so that the next process that writes into the folder can remove the
    file of a killed process.
    """
    # Only the beginning of the name, so that the result is never too long for a file system.
    other = path.parent / f".{path.name[:40]}.{platform.node()}.{os.getpid()}-{next(_numbers)}{_ASIDE}"
    _own.add(other)
    try:
        if path.parent not in _swept:
            _swept.add(path.parent)
            _sweep(path.parent)
        with os_errors():
            yield other
    finally:
        _remove(other)
        _own.discard(other)


@contextmanager
def os_errors() -> Iterator[None]:
    """Convert an error about a file that a library written in Rust raises into the OSError that Python would raise.

    safetensors has its own type for such errors, and tokenizers raises a plain Exception on a full disk.
    """
    try:
        yield
    except (OSError, InputError):
        raise
    except Exception as error:
        code = _RUST.search(str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def move(written: Path, path: Path, *, durable: bool = True) -> None:
    """Flush a file or folder to the disk and rename it; an existing file of that name is replaced."""
    if durable:
        flush(written, inside=True)
    written.replace(path)
    if durable:
        flush(path.parent)


def flush(path: Path, *, inside: bool = False) -> None:
    """Flush a file, or the names in a folder, to the disk; with `inside`, everything in the folder too."""
    if path.is_dir():
        if inside:
            every = [one for one in path.rglob("*") if not one.is_symlink()]
            if len(every) > _MANY and hasattr(os, "sync"):
                os.sync()
            else:
                for one in every:
                    flush(one)
        if os.name == "nt":  # Windows cannot open a folder
            return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot flush a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def _sweep(folder: Path) -> None:
    """Remove temporary files that killed processes of this machine left in a folder."""
    for left in folder.glob(f".*.{glob.escape(platform.node())}.*{_ASIDE}"):
        number = left.stem.rpartition(".")[2].partition("-")[0]
        if left not in _own and (number == str(os.getpid()) or (number.isdigit() and not _runs(int(number)))):
            _remove(left)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    """Return whether a process of this number exists; True on systems where asking could end the process."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


class ForeignEndError(InputError):
    """Error: a file ends in text that its journal never wrote."""


class Journal:
    """A file of lines that is only appended to, each a JSON object; open until it is closed, or `with` ends.

    Appended lines are written completely or not at all. A process that is killed at any moment leaves at most one
    truncated line, at the end: `lines` does not yield it, `mend` and `append` remove it. A last line that lacks only
    its line break gets it.
    """

    def __init__(
        self, path: Path, *, begins: bytes = b"{", durable: bool = True, hold: float | None = None, new: bool = True
    ) -> None:
        """Open a file.

        Args:
            path: The file.
            begins: Start of every line: a truncated end that begins differently is not removed, because another
                program wrote it.
            durable: Whether lines are on the disk when `append` returns.
            hold: Seconds to wait for a lock that keeps other processes out while the file is open, under any name (hard
                link) of it; below 0 without limit. None: the caller holds a `Lock`.
            new: Whether to create a missing file.

        Raises:
            filelock.Timeout: Another process holds the file.
            OSError: The file cannot be opened.
        """
        self.path, self._begins, self._durable, self._hold = path, begins, durable, hold
        self._appending = threading.RLock()
        self._lock: FileLock | None = None
        self._file = os.open(path, _OPEN | (os.O_CREAT if new else 0), 0o666)
        try:
            self._lock = None if hold is None else hold_file(path, hold)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and let other processes in."""
        if self._lock is not None:
            self._lock.release()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def read(self, start: int, length: int) -> bytes:
        """Return bytes of the file, even of one that was deleted meanwhile."""
        if sys.platform != "win32":
            return os.pread(self._file, length, start)
        with self._appending:  # `append` moves the file's position too
            os.lseek(self._file, start, os.SEEK_SET)
            return os.read(self._file, length)

    def lines(self) -> Iterator[bytes]:
        """Yield every line with its line break, but not a truncated end.

        Raises:
            ForeignEndError: The file ends in text that is not a truncated line of its own.
        """
        with self.path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield line
                elif self._is_whole(line):
                    yield line + b"\n"

    def append(self, content: bytes) -> int:
        """Append lines, each with its line break, and return the position of the first; may be called by threads.

        Raises:
            OSError: The lines cannot be written; then the file contains none of them.
            ForeignEndError: The file ends in text that is not a truncated line of its own.
        """
        with self._appending:
            self.mend()
            end = self._size()
            try:
                _write(self._file, content)
                if self._durable:
                    os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, end)
                raise
            return end

    def mend(self) -> None:
        """Remove a truncated last line; add the line break to a last line that lacks only that.

        Raises:
            ForeignEndError: The file ends in text that is not a truncated line of its own; it is unchanged.
        """
        end = start = self._size()
        if not end or self.read(end - 1, 1) == b"\n":
            return
        tail = b""
        while start and b"\n" not in tail:
            piece = min(_PIECE, start)
            start -= piece
            tail = self.read(start, piece) + tail
        torn = tail[tail.rfind(b"\n") + 1 :]
        if self._is_whole(torn):
            _write(self._file, b"\n")
        else:
            os.ftruncate(self._file, end - len(torn))

    def restore(self) -> bool:
        """Write the file again if it was deleted; return False if another file has its name."""
        try:
            there = self.path.stat()
        except FileNotFoundError:
            self._write_again()
            return True
        return os.path.samestat(there, os.fstat(self._file))

    def _write_again(self) -> None:
        new = os.open(self.path, _OPEN | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            for start in range(0, size := self._size(), _PIECE):
                _write(new, self.read(start, min(_PIECE, size - start)))
            os.dup2(new, self._file)  # under the same number, as others may be reading
        except BaseException:
            self.path.unlink()
            raise
        finally:
            os.close(new)
        if self._lock is not None:
            self._lock.release()
        if self._hold is not None:
            self._lock = hold_file(self.path, self._hold)

    def _size(self) -> int:
        return os.fstat(self._file).st_size

    def _is_whole(self, end: bytes) -> bool:
        """Return whether the end of a file lacks only a line break, or raise ForeignEndError if it is not ours."""
        # After a power failure a file may end in zeros.
        if end[: len(self._begins)] != self._begins[: len(end)] and end.strip(b"\0"):
            raise ForeignEndError(f"The end of {self.path} was not written by qllava; name another file, or repair it.")
        try:
            json.loads(end)
        except (ValueError, RecursionError):
            return False
        return True


def _write(file: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(file, rest) :]


def unwritable(path: Path, error: OSError) -> InputError:
    """Return the error for a file that cannot be written."""
    return InputError(f"{path} cannot be written ({error.strerror}). Free disk space, or choose another folder.")
