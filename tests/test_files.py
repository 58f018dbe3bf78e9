"""Locks: one process at a time, a sentence that names the holder, and nothing that a killed process leaves behind."""

from __future__ import annotations

import errno
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from qllava.config import InputError
from qllava.files import LOCK_FILE, Lock, locked_folder, made_once

ROOT = Path(__file__).resolve().parents[1]
HOLD = (
    "import sys, time; from pathlib import Path; from qllava.files import locked_folder\n"
    "with locked_folder(Path(sys.argv[1]), 'wait'): print('held', flush=True); time.sleep(60)"
)


def test_a_killed_holder_is_named_until_it_is_dead_and_blocks_nobody_then(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        who = f"{tmp_path} is in use by process {other.pid} on {platform.node()}; wait"
        with pytest.raises(InputError, match=f"^{who}.$"), locked_folder(tmp_path, "wait"):
            pass
        other.kill()
        other.wait()
    with locked_folder(tmp_path, "wait"):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", ".holder"}
    assert list(tmp_path.iterdir()) == []


def test_a_forked_child_does_not_keep_it(tmp_path: Path) -> None:
    """Workers of a data loader outlive a killed process for seconds."""
    held, end = os.pipe()
    with locked_folder(tmp_path, "wait"):
        child = os.fork()
        if not child:
            os.close(end)
            os.read(held, 1)  # until the parent closes its end
            os._exit(0)
    with locked_folder(tmp_path, "wait"):
        os.close(end)
    assert os.waitpid(child, 0)[1] == 0


def test_a_lock_that_was_deleted_is_not_taken_from_its_next_holder(tmp_path: Path) -> None:
    first, second = (Lock(tmp_path / LOCK_FILE, tmp_path / ".holder") for _ in range(2))
    first.take("it", "wait")
    (tmp_path / LOCK_FILE).unlink()
    second.take("it", "wait")
    first.free()
    assert (tmp_path / LOCK_FILE).exists()
    with pytest.raises(InputError, match="in use by process"):
        Lock(tmp_path / LOCK_FILE, tmp_path / ".holder").take("it", "wait")
    second.free()
    assert list(tmp_path.iterdir()) == []


def test_two_processes_may_make_one_folder_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with made_once(tmp_path / "data") as slow:
        (slow / "of").write_text("slow")
        monkeypatch.setattr(os, "getpid", lambda: 4711)
        with made_once(tmp_path / "data") as fast:
            (fast / "of").write_text("fast")
        assert fast != slow
    assert (tmp_path / "data" / "of").read_text() == "fast"
    with pytest.raises(ZeroDivisionError), made_once(tmp_path / "other"):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: FileLock, timeout: float) -> None:
        Path(self.lock_file).touch()
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with locked_folder(tmp_path, "wait"):
        said = capsys.readouterr().err
    assert said == f"qllava: {tmp_path} cannot be locked ({os.strerror(errno.ENOLCK)}): " + (
        "do not start a second process on it.\n"
    )
