"""A run that is killed again and again: the same calls and the same output as one that was never stopped.

What "no call is paid twice" means: a reply that is in the store is never asked for again. A request whose reply was
still on its way when the process died cannot be known to have been paid, and is asked again: at most as many for each
kill as there are calls at a time.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qllava.config import InputError
from qllava.data.contexts import read_contexts
from qllava.llm.store import Reply, Store
from qllava.synthesis import pipeline
from qllava.synthesis.pipeline import Job
from qllava.synthesis.prompting import DEFAULT_TYPES, Prompts
from qllava.synthesis.tasks import Asking, make_tasks
from tests.llm.server import ChatServer, Request, Said, key_of
from tests.planted import full, planted
from tests.synthesis.teaching import badly, read_lines, well, write_contexts

ROOT = Path(__file__).resolve().parents[2]
KILLS = 20
AT_A_TIME = 8


def start(contexts: Path, out: Path, url: str) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "qllava", "synthesize", str(contexts), str(out), "--teacher", "m", "--base-url", url]
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return subprocess.Popen(
        [*line, "--concurrency", str(AT_A_TIME)],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def bodies_of(job: Job) -> dict[str, str]:
    """Every call that a job makes: its key in the store -> the content of its request."""
    found: dict[str, str] = {}
    replies: dict[str, Reply | None] = {}
    with Store(job.store) as store:
        while steps := list(pipeline.needed(job, replies.get)):
            for _, step in steps:
                found[step.call.key] = key_of(step.call.body())
                replies[step.call.key] = store.get(step.call.key)
    return found


def test_killed_at_twenty_moments_gives_the_same_calls_and_the_same_output(tmp_path: Path) -> None:
    rng = random.Random(7)
    contexts = write_contexts(tmp_path / "contexts.jsonl", 50)
    tasks = make_tasks(read_contexts(contexts), DEFAULT_TYPES)
    whole = Job(tasks, Asking("m", Prompts()), tmp_path / "whole.json", tmp_path / "whole.calls.jsonl")
    with ChatServer(badly) as server:
        pipeline.run(whole, server.url, first_rest=0.01)
    bodies = bodies_of(whole)

    def unhurried(request: Request) -> Said:
        said = badly(request)
        return Said(**{**vars(said), "seconds": 0.01 + int(request.key[-4:], 16) / 0xFFFF * 0.02})

    out, store = tmp_path / "out.json", tmp_path / "out.calls.jsonl"
    asked_again: Counter[str] = Counter()
    with ChatServer(unhurried) as server:
        for life in range(KILLS + 1):
            kept = {bodies[line["key"]] for line in whole_lines(store)}
            asked_before = len(server.requests)
            paid_before = set(server.paid)
            process = start(contexts, out, server.url)
            if life < KILLS:
                if life % 4:  # while replies come in
                    wait_for(server, asked_before + rng.randint(1, 12), process)
                    time.sleep(rng.uniform(0, 0.02))
                else:  # whenever: while it starts, or reads
                    time.sleep(rng.uniform(0, 0.6))
                process.kill()
            error = process.communicate(timeout=60)[1]
            assert process.returncode == (-signal.SIGKILL if life < KILLS else 0), error.decode()
            new = [request.key for request in server.requests[asked_before:]]
            assert not kept & set(new), "a reply that was kept was asked for again"
            asked_again.update(paid_before & set(new))

    lines = read_lines(store)
    assert Counter(line["key"] for line in lines) == Counter(list(bodies))
    assert out.read_bytes() == whole.out.read_bytes()
    assert (tmp_path / "out.left_out.jsonl").read_bytes() == (tmp_path / "whole.left_out.jsonl").read_bytes()
    assert max(asked_again.values(), default=0) <= KILLS
    assert asked_again.total() <= KILLS * AT_A_TIME
    assert not list(tmp_path.glob(".*.partial"))


def whole_lines(store: Path) -> list[dict[str, str]]:
    """The lines that a process which was killed has left, without a torn one at the end."""
    lines = store.read_bytes().split(b"\n")[:-1] if store.exists() else []
    return [json.loads(line) for line in lines]


def wait_for(server: ChatServer, requests: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 60
    while len(server.requests) < requests and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.001)
    assert process.poll() is None, "the run ended before it was to be killed"


def test_ctrl_c_keeps_what_is_on_its_way(tmp_path: Path) -> None:
    contexts = write_contexts(tmp_path / "contexts.jsonl", 40)

    def slowly(request: Request) -> Said:
        return Said(**{**vars(well(request)), "seconds": 0.3})

    with ChatServer(slowly) as server:
        process = start(contexts, tmp_path / "out.json", server.url)
        wait_for(server, 3 * AT_A_TIME, process)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert b"qllava: interrupted" in error
    assert b"Traceback" not in error
    kept = read_lines(tmp_path / "out.calls.jsonl")
    assert len(kept) == server.paid.total() == len(server.requests) >= 3 * AT_A_TIME
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("moment", ["rows", "rename"])
def test_an_output_that_stood_there_is_whole_until_the_new_one_is(tmp_path: Path, moment: str) -> None:
    contexts = read_contexts(write_contexts(tmp_path / "contexts.jsonl", 3))
    job = Job(make_tasks(contexts, ("naive",)), Asking("m", Prompts()), tmp_path / "o.json", tmp_path / "o.calls.jsonl")
    job.out.write_text("old", encoding="utf-8")

    operation: Any
    operation, pattern = ("write", ".o.json.*.partial") if moment == "rows" else ("rename", "o.json")
    with planted(operation, f"{tmp_path}/{pattern}", full), pytest.raises(InputError, match="No space left"):
        pipeline.run(job)
    assert job.out.read_text(encoding="utf-8") == "old"
