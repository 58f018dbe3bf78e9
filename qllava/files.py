"""How files are written: whole or not at all, or line by line. Without torch.

- `whole_file`, `whole_folder`: written aside in the same folder, brought to the disk, renamed. A reader sees the old
  content or the new one. What a killed process leaves aside is removed by a later process of the same machine.
- `Journal`: a file of lines that is only appended to; a torn end is repaired.
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
"""Files of a folder from which on the whole disk is flushed at once: each alone takes milliseconds."""
_PIECE = 1 << 20
"""Bytes that are copied at a time."""
_RUST = re.compile(r"\(os error (\d+)\)")
"""How an error of the operating system is named by libraries that are written in Rust."""
_OPEN = os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0)

_numbers = itertools.count()
_own: set[Path] = set()
"""What this process is writing aside just now."""
_swept: set[Path] = set()
"""Folders that this process has looked through for what others left."""


@contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a path next to `path` to write to, and rename it to `path` at the end; remove it after an error.

    Args:
        path: The file; a link is followed. A device or a pipe is written directly.
        durable: Whether to bring it to the disk before it is renamed. Without, a machine that loses its power may leave
            a file of this name empty.

    Raises:
        OSError: It cannot be written; what was there before is untouched.
    """
    real = path.resolve()
    if real.exists() and not real.is_file() and not real.is_dir():
        yield real
        return
    with aside(real) as other:
        yield other
        move(other, real, durable=durable)


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all. Raises OSError as `whole_file` does."""
    with whole_file(path) as other:
        other.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any | None:
    """Return the content of a JSON file; None where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextmanager
def whole_folder(folder: Path, is_whole: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Yield a new folder next to `folder` and rename it to `folder` at the end; remove it after an error.

    Args:
        folder: What is made; its parents are made too.
        is_whole: Whether a folder of that name is complete, for one that several processes may make at the same time:
            the first complete one stays, any other is replaced. None: a folder that is there must be empty.

    Raises:
        OSError: It cannot be written, or a folder is there that is not empty.
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
    """Yield a name next to `path` to write to and then to `move`; what has that name at the end is removed.

    The name says which process of which machine writes there: what a killed process leaves is removed by the next one
    that writes into the folder.
    """
    # Of the name only so much that the whole is never longer than a file system takes.
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

    safetensors has a type of its own for them, and tokenizers raises a plain Exception on a full disk.
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
    """Bring a file or folder to the disk and rename it; a file that has the name already is replaced."""
    if durable:
        flush(written, inside=True)
    written.replace(path)
    if durable:
        flush(path.parent)


def flush(path: Path, *, inside: bool = False) -> None:
    """Bring a file, or the names in a folder, to the disk; with `inside`, everything in the folder too."""
    if path.is_dir():
        if inside:
            every = [one for one in path.rglob("*") if not one.is_symlink()]
            if len(every) > _MANY and hasattr(os, "sync"):
                os.sync()
            else:
                for one in every:
                    flush(one)
        if os.name == "nt":  # which cannot open a folder
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
    """Remove what processes of this machine that were killed have left aside in a folder."""
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
    """Whether there is a process of this number; where that cannot be asked without harm, yes."""
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
    """A file ends in something that its journal never wrote."""


class Journal:
    """A file of lines that is only appended to, each a JSON object; open until it is closed, or `with` ends.

    What is appended is written in one piece, or not at all. Stopping a process at any moment leaves at most one torn
    line, at the end: `lines` does not yield it, `mend` and `append` cut it off. A last line that lacks nothing but its
    line break gets it.
    """

    def __init__(
        self, path: Path, *, begins: bytes = b"{", durable: bool = True, hold: float | None = None, new: bool = True
    ) -> None:
        """Open a file.

        Args:
            path: The file.
            begins: How every line begins: a torn end that begins otherwise is not cut off, because somebody else
                wrote it.
            durable: Whether lines are on the disk when `append` returns.
            hold: Keep other processes out while the file is open, by whichever name (a hard link) they know it, and
                wait for them so many seconds; below 0 for ever. None: the caller holds a `Lock`.
            new: Whether to make the file where there is none.

        Raises:
            filelock.Timeout: Another process holds the file.
            OSError: It cannot be opened.
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
        with self._appending:  # which moves the file's one position, too
            os.lseek(self._file, start, os.SEEK_SET)
            return os.read(self._file, length)

    def lines(self) -> Iterator[bytes]:
        """Yield every line with its line break, but not a torn end. Raises ForeignEndError."""
        with self.path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield line
                elif self._is_whole(line):
                    yield line + b"\n"

    def append(self, content: bytes) -> int:
        """Add lines, each with its line break, and return where they begin. Threads may call it.

        Raises:
            OSError: They cannot be written; nothing of them is then left in the file.
            ForeignEndError: The file ends in something that is not a torn line of its own.
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
        """Cut off a last line that was not written to its end; end one that lacks its line break only.

        Raises:
            ForeignEndError: The file ends in something else; it is left as it is.
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
        """Write the file again if somebody has deleted it; return False if another file has its name."""
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
        """Whether the end of a file lacks nothing but a line break. Raises ForeignEndError where it is not ours."""
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
