"""Workers end with the process that started them, and do their work until then."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qllava.workers import pool

ROOT = Path(__file__).resolve().parents[1]
WAIT = """
import os, sys, time
from qllava.workers import pool
if __name__ == "__main__":
    with pool(1, start=sys.argv[1]) as workers:
        print(workers.submit(os.getpid).result(), flush=True)
        time.sleep(60)
"""


def test_work_is_done_elsewhere() -> None:
    with pool(1, start="spawn") as workers:
        assert workers.submit(os.getpid).result() != os.getpid()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="/proc tells whether a process has ended")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_worker_does_not_outlive_a_parent_that_is_killed(tmp_path: Path, start: str) -> None:
    script = tmp_path / "wait.py"
    script.write_text(WAIT)
    command = [sys.executable, script, start]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
    limit = time.monotonic() + 20
    while _runs(worker) and time.monotonic() < limit:
        time.sleep(0.02)
    assert not _runs(worker)


def _runs(pid: int) -> bool:
    """Whether a process is there and not only waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
