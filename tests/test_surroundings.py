"""Programs under an output that is not UTF-8, for a user without a home folder and a name, and on busy cores."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import platform
import pwd
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from qllava import cli, surroundings
from qllava.config import InputError, cache_folder
from qllava.locks import locked_folder
from qllava.training.main import main
from qllava.training.run import finetune
from qllava.voting.votes import Vote, VoteFile, read_votes
from tests.tiny_models import make_tiny_records
from tests.tiny_runs import Tiny, stage2_settings

ROOT = Path(__file__).resolve().parents[1]
JAPANESE = "\u732b\u306f\u3069\u3053\u3067\u3059\u304b"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """The tiny examples with a question that neither ASCII nor cp1252 can say, in a folder with such a name."""
    folder = tmp_path / JAPANESE
    folder.mkdir()
    path = make_tiny_records(folder)
    read = json.loads(path.read_text(encoding="utf-8"))
    for row in read:
        row["id"] = f"{JAPANESE}-{row['id']}"
        for turn in row["conversations"]:
            turn["value"] = turn["value"].replace("What", f"{JAPANESE} What")
    path.write_text(json.dumps(read, ensure_ascii=False), encoding="utf-8")
    return path


def under(monkeypatch: pytest.MonkeyPatch, program: Callable[[], int]) -> tuple[int, bytes]:
    """Run a program with the three streams of a pipe on Windows; its status, and what it printed."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True) for _ in range(3)]
    with monkeypatch.context() as patch:
        for name, stream in zip(("stdin", "stdout", "stderr"), streams, strict=True):
            patch.setattr(sys, name, stream)
        status = program()
    return status, streams[1].buffer.getvalue()  # type: ignore[attr-defined]


def test_every_program_can_print_every_text(
    rows: Path, tiny: Tiny, hf_layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = str(next(rows.parent.rglob("*.png")))
    data = ["--tokenizer", str(hf_layout), "--template", "chatml"]
    vqa = [{"image": image, "question": JAPANESE, "answer": "red", "question_type": JAPANESE}]
    (tmp_path / "vqa.json").write_text(json.dumps(vqa, ensure_ascii=False), encoding="utf-8")
    lines = {
        "check": ["check", str(rows), "--model", str(hf_layout), "--template", "chatml"],
        "inspect": ["inspect", str(rows), "--rows", "1", *data],
        "a missing file": ["check", f"{JAPANESE}.json"],
        "chat": ["chat", str(hf_layout), "--image", image, "--prompt", JAPANESE, "--max-new-tokens", "2"],
        "eval": ["eval", "vqa", str(hf_layout), str(tmp_path / "vqa.json")],
    }
    said = {}
    for name, line in lines.items():
        status, said[name] = under(monkeypatch, lambda line=line: cli.main(line))
        assert status == (1 if name == "a missing file" else 0), (name, said[name])
    assert JAPANESE.encode("ascii", "backslashreplace") in said["inspect"]
    settings = stage2_settings(tiny, tmp_path / f"{JAPANESE}-run", train_file=rows, eval_file=rows, max_steps=1)
    status, training = under(monkeypatch, lambda: main(finetune, lambda: settings))
    assert status == 0 and JAPANESE.encode("ascii", "backslashreplace") in training


def test_a_folder_belongs_to_one_run_at_a_time(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A requeued job starts while the one before it still saves: neither may continue the other's checkpoints."""
    settings = stage2_settings(tiny, tmp_path / "run")
    (tmp_path / "run").mkdir()
    with locked_folder(tmp_path / "run", "wait"):
        assert main(finetune, lambda: settings) == 1
        assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", ".holder"}
    said = f"{tmp_path / 'run'} is in use by process {os.getpid()} on {platform.node()}; wait until it ends"
    assert said in capsys.readouterr().err


def test_no_vote_is_lost_where_files_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    VoteFile(tmp_path / "votes.jsonl").append(
        Vote(id="1", question="What?", answers={"left": "a", "right": "b"}, vote="left")
    )
    assert len(read_votes(tmp_path / "votes.jsonl")) == 1


def test_a_real_pipe(rows: Path) -> None:
    """The process's own streams, as Python opens them."""
    line = [sys.executable, "-m", "qllava", "check", f"{rows}.missing"]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, env=environment, capture_output=True, check=False)
    assert done.returncode == 1
    assert JAPANESE.encode("ascii", "backslashreplace") in done.stdout + done.stderr and b"Traceback" not in done.stderr


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user without HOME, name and line in the password file; returns the folder for temporary files."""

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "QLLAVA_CACHE", "LOCAL_RANK"):
        # Set first, so that what the program sets is taken back at the end.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_user_without_a_home_gets_one_and_is_told(nobody: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="Set QLLAVA_CACHE"):
        cache_folder()
    surroundings.find_home()
    home = nobody / f"qllava-home-{os.getuid()}"
    assert cache_folder() == home / ".cache" / "qllava"
    assert home.stat().st_mode & 0o777 == 0o700
    said = capsys.readouterr().err
    assert said.startswith(f"qllava: user uid-{os.getuid()} has no writable home folder") and str(home) in said
    surroundings.find_home()
    assert capsys.readouterr().err == ""
    assert surroundings.user_name() == f"uid-{os.getuid()}" == os.environ["LOGNAME"]


def test_a_home_that_another_user_may_write_to_is_not_trusted(nobody: Path) -> None:
    (nobody / f"qllava-home-{os.getuid()}").mkdir(mode=0o777)
    (nobody / f"qllava-home-{os.getuid()}").chmod(0o777)
    surroundings.find_home()
    assert Path(os.environ["HOME"]).parent == nobody
    assert os.environ["HOME"] != str(nobody / f"qllava-home-{os.getuid()}")


def test_a_home_that_is_usable_or_has_a_cache_stays(nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (nobody / "mine" / ".cache").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(nobody / "mine"))
    surroundings.find_home()
    assert os.environ["HOME"] == str(nobody / "mine")
    (nobody / "mine" / ".cache").rmdir()
    surroundings.find_home()
    assert os.environ["HOME"] == str(nobody / f"qllava-home-{os.getuid()}")


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can become an unknown user")
def test_a_real_unknown_user(tmp_path: Path) -> None:
    """As a container starts one: a number without a line in the password file, and an environment without HOME.

    It becomes that user when everything is imported, because another user may not read this clone.
    """
    code = (
        "import getpass, os, pwd, tempfile; from qllava import config, surroundings; os.setgroups([]); "
        "os.setgid(54321); os.setuid(54321); surroundings.prepare_process(); print(config.cache_folder())"
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        line, environment = [sys.executable, "-c", code], {"PYTHONPATH": str(ROOT), "TMPDIR": folder}
        done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.strip()) == (0, f"{folder}/qllava-home-54321/.cache/qllava"), done.stderr
        assert f"user uid-54321 has no writable home folder, so caches are written to {folder}" in done.stderr


def test_threads_sleep_while_they_wait() -> None:
    """As OpenMP itself understood it: spinning threads make a small model twenty times slower on a busy machine."""
    code = "import sys; from qllava.surroundings import prepare_process; prepare_process(); import torch"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "TRUE"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    if "OMP_WAIT_POLICY" not in done.stderr:
        pytest.skip("this torch has another OpenMP than GNU's")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr


@pytest.mark.parametrize("given", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_how_threads_wait_is_the_users_choice(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.setenv(name, "")
    surroundings.wait_asleep()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    monkeypatch.setenv(given, "ACTIVE")
    surroundings.wait_asleep()
    assert os.environ["OMP_WAIT_POLICY"] == ("ACTIVE" if given == "OMP_WAIT_POLICY" else "")
