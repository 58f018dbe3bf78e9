"""Batch files: the same output as a live run, in any order of results, with failed requests and a second round."""

from __future__ import annotations

import json
import random
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qllava.config import InputError
from qllava.data.contexts import Context, read_contexts
from qllava.llm import batch
from qllava.llm.store import Store
from qllava.synthesis import pipeline
from qllava.synthesis.pipeline import Job
from qllava.synthesis.prompting import DEFAULT_TYPES, Prompts
from qllava.synthesis.tasks import Asking, make_tasks
from tests.llm.server import ChatServer, Request, Said, completion
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
    assert pipeline.export_batch(job, requests).calls == len(job.tasks) == 90
    assert not job.store.exists()
    run_batch(requests, results)
    first = pipeline.import_batch(job, [results])
    assert first.imported is not None
    assert first.imported.replies == 90
    repairs = first.counts.total("left")
    assert repairs > 0
    assert pipeline.export_batch(job, requests).calls == repairs
    run_batch(requests, results)
    second = pipeline.import_batch(job, [results])
    assert second.counts.to_json() == asked.counts.to_json()
    assert second.calls_kept == asked.calls
    assert job.out.read_bytes() == live.out.read_bytes()
    assert pipeline.export_batch(job, requests).calls == 0
    assert requests.read_text() == ""  # so that a file of an earlier round is not sent again


def test_results_may_come_twice_and_failed_requests_are_written_again(tmp_path: Path, job: Job) -> None:
    requests, results = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    pipeline.export_batch(job, requests)
    run_batch(requests, results, fail=10)
    first = pipeline.import_batch(job, [results]).imported
    assert first is not None
    assert (first.replies, first.failed, first.known, first.foreign) == (80, 10, 0, 0)
    before = job.store.read_bytes()
    second = pipeline.import_batch(job, [results]).imported
    assert second is not None
    assert (second.replies, second.failed, second.known) == (0, 10, 80)
    assert job.store.read_bytes() == before
    pipeline.export_batch(job, requests)
    run_batch(requests, results)
    pipeline.import_batch(job, [results])
    assert len(read_lines(job.store)) >= 90


def test_a_live_run_goes_on_where_a_batch_ended(tmp_path: Path, job: Job) -> None:
    requests, results = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    pipeline.export_batch(job, requests)
    run_batch(requests, results)
    repairs = pipeline.import_batch(job, [results]).counts.total("left")
    with ChatServer(settled) as server:
        assert pipeline.run(job, server.url).calls == repairs == server.asked.total()


def test_a_budget_bounds_a_batch(tmp_path: Path, job: Job) -> None:
    requests, results = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    assert pipeline.export_batch(job, requests, max_calls=20).calls == 20
    run_batch(requests, results)
    pipeline.import_batch(job, [results])
    assert pipeline.export_batch(job, requests, max_calls=25).calls == 5
    assert 0 < pipeline.export_batch(job, requests, max_tokens=300_000).calls < 70


def test_more_than_a_file_holds_becomes_several(tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = tmp_path / "requests.jsonl"
    assert (batch.MOST_REQUESTS, batch.MOST_BYTES) == (50_000, 200_000_000)
    whole = pipeline.export_batch(job, requests)
    assert whole.files == (requests,)
    lines = requests.read_bytes().splitlines(keepends=True)
    monkeypatch.setattr(batch, "MOST_REQUESTS", 40)
    several = pipeline.export_batch(job, requests)
    assert [file.name for file in several.files] == [f"requests-{n:05d}.jsonl" for n in (1, 2, 3)]
    assert [file.read_bytes().count(b"\n") for file in several.files] == [40, 40, 10]
    assert b"".join(file.read_bytes() for file in several.files) == b"".join(lines)
    assert not requests.exists()  # of an earlier export: it would be sent again
    monkeypatch.setattr(batch, "MOST_BYTES", 2 * max(map(len, lines)))
    several = pipeline.export_batch(job, requests)
    assert len(several.files) > 40
    assert max(file.stat().st_size for file in several.files) <= batch.MOST_BYTES
    assert b"".join(file.read_bytes() for file in several.files) == b"".join(lines)

    results = []
    for number, file in enumerate(several.files):
        results.append(tmp_path / f"results-{number}.jsonl")
        run_batch(file, results[-1])
    imported = pipeline.import_batch(job, results).imported
    assert imported is not None
    assert imported.replies == 90
    monkeypatch.undo()
    assert pipeline.export_batch(job, requests).files == (requests,)
    assert not list(tmp_path.glob("requests-*"))
    assert not list(tmp_path.glob(".*.partial"))


def test_a_line_that_says_200_over_an_error_is_no_reply(tmp_path: Path, job: Job) -> None:
    requests, results = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    pipeline.export_batch(job, requests)
    bodies: list[Any] = [
        {"error": {"message": "overloaded", "code": 503}},
        json.dumps({"error": {"message": "overloaded"}}),
        {"object": "error", "message": "too long", "code": 400},
        {"choices": [{"finish_reason": "error", "message": {"content": ""}}]},
        {"choices": [], "error": "down"},
    ]
    lines = read_lines(requests)
    results.write_text(
        "".join(
            json.dumps({"custom_id": line["custom_id"], "response": {"status_code": 200, "body": body}}) + "\n"
            for line, body in zip(lines, bodies, strict=False)
        )
    )
    imported = pipeline.import_batch(job, [results]).imported
    assert imported is not None
    assert (imported.replies, imported.failed) == (0, len(bodies))
    assert job.store.read_bytes() == b""
    assert pipeline.export_batch(job, requests).calls == 90


def test_a_result_that_comes_twice_counts_once(tmp_path: Path, job: Job) -> None:
    requests, results = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    pipeline.export_batch(job, requests)
    run_batch(requests, results)
    results.write_bytes(results.read_bytes() * 2)
    found = pipeline.import_batch(job, [results, results])
    assert found.imported is not None
    assert (found.imported.replies, found.imported.known) == (90, 270)
    assert found.calls == len(read_lines(job.store)) == 90


def test_a_file_of_results_of_any_size_is_read_in_the_memory_of_a_line(
    tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four times the lines, most of them long ones of somebody else, and the same peak."""
    monkeypatch.setattr(batch, "_AT_ONCE", 10)
    pipeline.export_batch(job, tmp_path / "requests.jsonl")
    run_batch(tmp_path / "requests.jsonl", tmp_path / "ours.jsonl")
    ours = (tmp_path / "ours.jsonl").read_bytes().splitlines(keepends=True)
    body = {"choices": [{"message": {"content": "word " * 2000}}]}

    def peak(lines: int) -> int:
        path, store = tmp_path / "results.jsonl", tmp_path / f"{lines}.calls.jsonl"
        with path.open("wb") as file:
            for number in range(lines):
                file.write(json.dumps({"custom_id": f"{number:064x}", "response": {"body": body}}).encode() + b"\n")
                file.writelines(ours[number : number + 1])
        tracemalloc.start()
        try:
            found = pipeline.import_batch(replace(job, store=store), [path]).imported
            assert found is not None
            assert (found.replies, found.foreign) == (90, lines)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)  # what is read once: prompts, patterns
    small, large = peak(250), peak(1000)
    assert large - small < 1 << 18, f"{small:,} and {large:,} bytes"


def test_a_call_that_is_wanted_costs_less_memory_than_its_text(tmp_path: Path) -> None:
    """What an import holds of each call: its key, not its messages."""
    contexts = [Context(f"{n}", f"{n}.jpg", (f"Image {n}: " + "a dog runs, " * 200,), ()) for n in range(600)]
    job = Job(make_tasks(contexts, ("detail",)), Asking("m", Prompts()), tmp_path / "o.json", tmp_path / "c.jsonl")
    with Store(job.store) as store:
        pipeline._wanted(replace(job, tasks=job.tasks[:5]), store)  # what is read once
        tracemalloc.start()
        call_of = pipeline._wanted(job, store)
        held = tracemalloc.get_traced_memory()[0] / len(job.tasks)
        tracemalloc.stop()
        call = job.asking.call(job.tasks[3], "schema")
        assert call_of(call.key) == call
        assert call_of("zz") is call_of("0" * 64) is None
    assert held < 400 < len(str(call.body()))


def test_results_of_something_else_are_refused(tmp_path: Path, job: Job) -> None:
    requests, results = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    pipeline.export_batch(replace(job, asking=Asking("another", Prompts())), requests)
    run_batch(requests, results)
    with pytest.raises(InputError, match="none of its 90 results belongs to a call of this command"):
        pipeline.import_batch(job, [results])
    results.write_text('{"custom_id": "a", "response": null}\n{"id": 3}\n')
    with pytest.raises(InputError, match=r"results\.jsonl, line 2: this line is not a result of a batch API"):
        pipeline.import_batch(job, [results])
    assert read_lines(job.store) == []


def test_equal_calls_are_written_once_and_answer_every_image_that_makes_them(tmp_path: Path, job: Job) -> None:
    twin = replace(job.tasks[0], context=replace(job.tasks[0].context, id="twin"))
    twins = replace(job, tasks=[job.tasks[0], twin])
    requests, results = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    assert pipeline.export_batch(twins, requests).calls == len(read_lines(requests)) == 1
    run_batch(requests, results)
    assert pipeline.import_batch(twins, [results]).counts.to_json()["tasks"] == 2
    assert len(read_lines(job.store)) == 1
