"""Files are whole or absent, journals survive a torn end, locks name their holder; a killed process leaves nothing."""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout
from tokenizers import Tokenizer
from tokenizers.models import BPE

from qllava.config import InputError
from qllava.files import ForeignEndError, Journal, whole_file, whole_folder, write_whole
from qllava.locks import LOCK_FILE, Lock, locked_folder, refuse_held
from qllava.training.durable.checkpoints import saving

ROOT = Path(__file__).resolve().parents[1]
HOLD = (
    "import sys, time; from pathlib import Path; from qllava.locks import locked_folder\n"
    "with locked_folder(Path(sys.argv[1]), 'wait'): print('held', flush=True); time.sleep(60)"
)


def test_a_killed_holder_is_named_until_it_is_dead_and_blocks_nobody_then(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        who = f"{tmp_path} is in use by process {other.pid} on {platform.node()}; wait"
        with pytest.raises(InputError, match=f"^{who}.$"):
            refuse_held(tmp_path, "wait")
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
    with whole_folder(tmp_path / "data", Path.is_dir) as slow:
        (slow / "of").write_text("slow")
        monkeypatch.setattr(os, "getpid", lambda: 4711)
        with whole_folder(tmp_path / "data", Path.is_dir) as fast:
            (fast / "of").write_text("fast")
        assert fast != slow
    assert (tmp_path / "data" / "of").read_text() == "fast"
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "other"):
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
    assert said == (
        f"qllava: warning: {tmp_path} cannot be locked ({os.strerror(errno.ENOLCK)}). The command continues; do not "
        "start a second process on it.\n"
    )


def dead_process() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    return ended.pid


def test_what_a_killed_process_left_aside_is_removed_by_the_next_writer(tmp_path: Path) -> None:
    node, ended = platform.node(), dead_process()
    left = [tmp_path / f".{name}.{node}.{ended}{end}.partial" for name in ("a.json", "b") for end in ("", "-3")]
    left[0].write_text("{")
    left[1].write_text("{")
    left[2].mkdir()
    (left[3] / "inside").mkdir(parents=True)
    kept = {f".a.json.{node}.{os.getppid()}-0.partial", f".a.json.elsewhere.{ended}-0.partial", ".partial", "a.partial"}
    for name in kept:
        (tmp_path / name).write_text("another's")
    write_whole(tmp_path / "new.json", "{}")
    assert {path.name for path in tmp_path.iterdir()} == kept | {"new.json"}


def test_a_file_is_replaced_whole_or_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / f"{'n' * 240}.json"  # with an addition of its own length it would be too long
    write_whole(path, "old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as aside:
        aside.write_text("ne")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    (tmp_path / "link").symlink_to(path)
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and path.read_text() == "new"
    assert {one.name for one in tmp_path.iterdir()} == {path.name, "link"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
@pytest.mark.parametrize(
    "write",
    [lambda: Tokenizer(BPE()).save("/dev/full"), lambda: Path("/dev/full").write_text("{}")],
    ids=["tokenizers", "Python"],
)
def test_a_full_disk_is_one_error_whichever_library_writes(tmp_path: Path, write: Callable[[], Any]) -> None:
    """The tokenizers library raises a plain Exception for it."""
    for writer in (whole_file, whole_folder):
        with pytest.raises(OSError) as caught, writer(tmp_path / "new"):
            write()
        assert caught.value.errno == errno.ENOSPC and not [*tmp_path.iterdir()]
    with pytest.raises(InputError, match="The checkpoint could not be saved .*No space left"), saving("The checkpoint"):
        write()


def test_an_error_that_is_none_of_the_disk_stays_as_it_is(tmp_path: Path) -> None:
    for error in (KeyError("a"), InputError("a (os error 28)")):
        with pytest.raises(type(error)), whole_file(tmp_path / "new"):
            raise error


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", "said")
    assert os.read(reader, 10) == b"said"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


def test_a_folder_that_holds_something_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with whole_folder(tmp_path / "data") as aside:
        (aside / "of").write_text("first")
    with pytest.raises(OSError, match="not empty"), whole_folder(tmp_path / "data") as aside:
        (aside / "of").write_text("second")
    assert (tmp_path / "data" / "of").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_journal_survives_a_stop_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    first, second, third = (json.dumps({"id": text}).encode() + b"\n" for text in ("1", "zwei {", "3"))
    for end in range(len(first) + len(second) + 1):
        path.write_bytes((first + second)[:end])
        whole = [first] * (end >= len(first) - 1) + [second] * (end >= len(first) + len(second) - 1)
        with Journal(path, begins=b'{"id": "') as journal:
            assert list(journal.lines()) == whole
            assert path.read_bytes() == (first + second)[:end]  # reading mends nothing
            assert journal.append(third) == len(b"".join(whole))
        assert path.read_bytes() == b"".join(whole) + third


@pytest.mark.parametrize("end", [b"two", b'{"question": ', b"\xff", b"[" * 100_000])
def test_a_journal_cuts_nothing_that_another_program_wrote(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "notes"
    path.write_bytes(b"one\n" + end)
    with Journal(path, begins=b'{"id": ') as journal:
        for write in (journal.mend, lambda: journal.append(b"{}\n"), lambda: list(journal.lines())):
            with pytest.raises(ForeignEndError):
                write()
    assert path.read_bytes() == b"one\n" + end


def test_zeros_that_a_power_failure_left_are_a_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"id": 1}\n' + bytes(2_000_000))
    with Journal(path, begins=b'{"id": ') as journal:
        journal.append(b'{"id": 2}\n')
    assert path.read_bytes() == b'{"id": 1}\n{"id": 2}\n'


def test_a_journal_that_does_not_fit_on_the_disk_keeps_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, content: bytes, write: Callable[[int, bytes], int] = os.write) -> int:
        if len(content) < 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, content[: len(content) // 2])

    with Journal(tmp_path / "journal.jsonl") as journal:
        journal.append(b'{"id": 1}\n')
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            journal.append(b'{"id": 2}\n')
        monkeypatch.undo()
        journal.append(b'{"id": 3}\n')
    assert (tmp_path / "journal.jsonl").read_bytes() == b'{"id": 1}\n{"id": 3}\n'


def test_a_journal_that_is_held_lets_nobody_in_by_another_name(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal", hold=0) as journal:
        journal.append(b"{}\n")
        (tmp_path / "hard").hardlink_to(tmp_path / "journal")
        for _ in range(2):
            with pytest.raises(Timeout):
                Journal(tmp_path / "hard", hold=0)
        (tmp_path / "journal").unlink()
        assert journal.restore()
        (tmp_path / "again").hardlink_to(tmp_path / "journal")
        with pytest.raises(Timeout):
            Journal(tmp_path / "again", hold=0)
        (tmp_path / "journal").unlink()
        (tmp_path / "journal").touch()
        assert not journal.restore()
    assert (tmp_path / "again").read_bytes() == b"{}\n"


def test_a_journal_is_read_while_another_thread_appends(tmp_path: Path) -> None:
    """An append moves the position of the file, so that a read between found nothing: found by forty calls at once."""
    line = b'{"number": 1}\n'
    with Journal(tmp_path / "lines.jsonl", durable=False) as journal:
        journal.append(line)
        writer = threading.Thread(target=lambda: [journal.append(line * 20) for _ in range(3_000)])
        writer.start()
        found = set()
        while writer.is_alive():
            found.add(journal.read(0, len(line)))
        writer.join()
    assert found == {line}
