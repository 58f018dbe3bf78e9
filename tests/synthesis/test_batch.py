"""Batch files: the same output as a live run, in any order of results, with failed requests and a second round."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qllava.config import InputError
from qllava.synthesis import pipeline
from qllava.synthesis.contexts import read_contexts
from qllava.synthesis.pipeline import Job
from qllava.synthesis.prompting import DEFAULT_TYPES, Prompts
from qllava.synthesis.tasks import Asking, make_tasks
from tests.synthesis.server import ChatServer, Request, Said, completion
from tests.synthesis.teaching import badly, read_lines, write_contexts


@pytest.fixture
def job(tmp_path: Path) -> Job:
    contexts = read_contexts(write_contexts(tmp_path / "contexts.jsonl", 30))
    out = tmp_path / "out.json"
    return Job(make_tasks(contexts, DEFAULT_TYPES), Asking("m", Prompts()), out, tmp_path / "out.calls.jsonl")


def settled(request: Request) -> Said:
    """What `badly` says in the end, after whatever passes."""
    return badly(replace(request, before=1))


def run_batch(requests: Path, results: Path, *, fail: int = 0) -> None:
    """What a batch does: answers every line, in another order; `fail` of them it cannot."""
    lines = [json.loads(line) for line in requests.read_text(encoding="utf-8").splitlines()]
    random.Random(1).shuffle(lines)
    done: list[dict[str, Any]] = []
    for number, line in enumerate(lines):
        assert (line["method"], line["url"]) == ("POST", "/v1/chat/completions")
        request = Request(line["body"], {}, 1)
        said = settled(request)
        body = completion(request, said) if said.body is None else said.body
        answer: dict[str, Any] = {"response": {"status_code": 200, "body": _json(body)}, "error": None}
        if number < fail:
            failures: list[dict[str, Any]] = [
                {"response": {"status_code": 500, "body": {}}, "error": None},
                {"response": None, "error": {"code": "batch_expired", "message": "expired"}},
            ]
            answer = failures[number % 2]
        done.append({"id": f"batch-{number}", "custom_id": line["custom_id"], **answer})
    results.write_text("".join(json.dumps(line) + "\n" for line in done), encoding="utf-8")


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode()


def test_a_batch_gives_what_a_live_run_gives(tmp_path: Path, job: Job) -> None:
    live = replace(job, out=tmp_path / "live.json", store=tmp_path / "live.calls.jsonl")
    with ChatServer(settled) as server:
        asked = pipeline.run(live, server.url, first_rest=0.005)

    requests, results = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    assert pipeline.export_batch(job, requests) == len(job.tasks) == 90
    assert not job.store.exists()
    run_batch(requests, results)
    first = pipeline.import_batch(job, results)
    assert first.imported is not None
    assert first.imported.replies == 90
    repairs = first.counts.total("left")
    assert repairs > 0
    assert pipeline.export_batch(job, requests) == repairs
    run_batch(requests, results)
    second = pipeline.import_batch(job, results)
    assert second.counts.to_json() == asked.counts.to_json()
    assert second.calls_kept == asked.calls
    assert job.out.read_bytes() == live.out.read_bytes()
    assert pipeline.export_batch(job, requests) == 0
    assert requests.read_text() == ""  # so that a file of an earlier round is not sent again


def test_results_may_come_twice_and_failed_requests_are_written_again(tmp_path: Path, job: Job) -> None:
    requests, results = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    pipeline.export_batch(job, requests)
    run_batch(requests, results, fail=10)
    first = pipeline.import_batch(job, results).imported
    assert first is not None
    assert (first.replies, first.failed, first.known, first.foreign) == (80, 10, 0, 0)
    before = job.store.read_bytes()
    second = pipeline.import_batch(job, results).imported
    assert second is not None
    assert (second.replies, second.failed, second.known) == (0, 10, 80)
    assert job.store.read_bytes() == before
    pipeline.export_batch(job, requests)
    run_batch(requests, results)
    pipeline.import_batch(job, results)
    assert len(read_lines(job.store)) >= 90


def test_a_live_run_goes_on_where_a_batch_ended(tmp_path: Path, job: Job) -> None:
    requests, results = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    pipeline.export_batch(job, requests)
    run_batch(requests, results)
    repairs = pipeline.import_batch(job, results).counts.total("left")
    with ChatServer(settled) as server:
        assert pipeline.run(job, server.url).calls == repairs == server.asked.total()


def test_a_budget_bounds_a_batch(tmp_path: Path, job: Job) -> None:
    requests, results = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    assert pipeline.export_batch(job, requests, max_calls=20) == 20
    run_batch(requests, results)
    pipeline.import_batch(job, results)
    assert pipeline.export_batch(job, requests, max_calls=25) == 5
    assert 0 < pipeline.export_batch(job, requests, max_tokens=100_000) < 70


def test_results_of_something_else_are_refused(tmp_path: Path, job: Job) -> None:
    requests, results = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    pipeline.export_batch(replace(job, asking=Asking("another", Prompts())), requests)
    run_batch(requests, results)
    with pytest.raises(InputError, match="none of its 90 results answers a call of this command"):
        pipeline.import_batch(job, results)
    results.write_text('{"custom_id": "a", "response": null}\n{"id": 3}\n')
    with pytest.raises(InputError, match=r"results\.jsonl, line 2: this is no result of a batch"):
        pipeline.import_batch(job, results)
    assert read_lines(job.store) == []


def test_equal_calls_are_written_once_and_answer_every_picture_that_makes_them(tmp_path: Path, job: Job) -> None:
    twin = replace(job.tasks[0], context=replace(job.tasks[0].context, id="twin"))
    twins = replace(job, tasks=[job.tasks[0], twin])
    requests, results = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    assert pipeline.export_batch(twins, requests) == len(read_lines(requests)) == 1
    run_batch(requests, results)
    assert pipeline.import_batch(twins, results).counts.to_json()["tasks"] == 2
    assert len(read_lines(job.store)) == 1
