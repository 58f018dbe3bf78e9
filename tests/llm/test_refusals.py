"""Refusals and outages: one request's fault is its own, and what passes is waited for."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import httpx
import pytest

from qllava.config import InputError
from qllava.data.contexts import read_contexts
from qllava.evaluation.asking import Judge
from qllava.llm.client import Client
from qllava.llm.store import Call, Store
from qllava.synthesis import pipeline
from qllava.synthesis.pipeline import Job
from qllava.synthesis.prompting import DEFAULT_TYPES, Prompts
from qllava.synthesis.tasks import Asking, make_tasks
from tests.llm.server import Request, Said
from tests.llm.wire import QuickLoop, Wire
from tests.synthesis.teaching import read_lines, well, write_contexts

URL = "http://127.0.0.1:9/v1"


@pytest.fixture(autouse=True)
def no_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, address or proxy of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith("OPENAI_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    contexts = read_contexts(write_contexts(tmp_path / "contexts.jsonl", 200))
    out = tmp_path / "out.json"
    return Job(make_tasks(contexts, ("detail",)), Asking("m", Prompts()), out, tmp_path / "out.calls.jsonl")


def wired(monkeypatch: pytest.MonkeyPatch, answer: Any) -> Wire:
    wire = Wire(answer)

    async def post(_: Client, content: bytes) -> httpx.Response:
        return await wire.post(content)

    monkeypatch.setattr(Client, "_post", post)
    return wire


def number_of(request: Request) -> int:
    """Of the image that is asked about."""
    text = next(m["content"] for m in reversed(request.body["messages"]) if ", picture " in m["content"])
    return int(text.partition(", picture ")[2].partition(".")[0])


def ask(path: Path, texts: list[str], **limits: Any) -> dict[str, str]:
    """Ask each text on a clock that does not wait; its reply, or why there is none."""
    said: dict[str, str] = {}

    async def run() -> None:
        with Store(path / "calls.jsonl") as store:
            async with Client(store, URL, **limits) as teacher:

                async def one(text: str) -> None:
                    call = Call("m", ({"role": "user", "content": text},), {"max_tokens": 50}, "1")
                    said[text] = (await teacher.ask(call)).text

                await teacher.each(texts, one, lambda text, reason: said.update({text: f"no reply: {reason}"}))

    with asyncio.Runner(loop_factory=QuickLoop) as runner:
        runner.run(run())
    return said


TEXTS = [f"text {n}" for n in range(40)]


@pytest.mark.parametrize("status", [400, 403, 404, 413, 422])
@pytest.mark.parametrize("refused", [range(20, 45), range(1, 200, 8)], ids=["together", "apart"])
def test_a_refusal_of_some_keeps_no_other_from_being_asked(
    job: Job, monkeypatch: pytest.MonkeyPatch, status: int, refused: range
) -> None:
    wire = wired(monkeypatch, lambda r: Said("no", status=status) if number_of(r) in refused else well(r))
    result = pipeline.run(job, URL)
    assert (result.counts.total("accepted"), result.counts.total("failed")) == (175, 25)
    assert set(result.failures.values()) == {f"status {status}: no"}
    assert len(wire.requests) == 200


def test_the_first_ones_may_be_the_refused_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All types of the first 25 images, with a server that may or may not take a schema."""
    contexts = read_contexts(write_contexts(tmp_path / "contexts.jsonl", 200))
    tasks = make_tasks(contexts, DEFAULT_TYPES)
    job = Job(tasks, Asking("m", Prompts()), tmp_path / "out.json", tmp_path / "out.calls.jsonl")
    wired(monkeypatch, lambda r: Said("no", status=400) if number_of(r) < 25 else well(r))
    result = pipeline.run(job, URL)
    assert (result.counts.total("accepted"), result.counts.total("failed")) == (525, 75)


def test_what_failed_is_asked_last_by_the_next_run(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    wire = wired(monkeypatch, lambda r: Said("no", status=403) if number_of(r) < 30 else well(r))
    with pytest.raises(InputError, match="requires another key"):  # nothing but 403, so far
        pipeline.run(job, URL, concurrency=1)
    assert [number_of(request) for request in wire.requests] == list(range(20))
    wire.requests.clear()
    result = pipeline.run(job, URL, concurrency=1)
    asked = [number_of(request) for request in wire.requests]
    assert asked == [*range(20, 200), *range(20)]
    assert (result.counts.total("accepted"), result.counts.total("failed")) == (170, 30)
    wire.requests.clear()
    # Only what failed is left: that it fails again is no news, and ends nothing.
    assert pipeline.run(job, URL).counts.total("failed") == 30
    wire.answer = well
    assert pipeline.run(job, URL).counts.total("accepted") == 200
    assert read_lines(job.store)


def test_a_batch_and_its_budget_leave_what_failed_for_last(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wired(monkeypatch, lambda r: Said("no", status=400) if number_of(r) < 5 else Said("later", status=401))
    with pytest.raises(InputError, match="requires another key"):
        pipeline.run(job, URL, concurrency=1)
    requests = tmp_path / "requests.jsonl"
    pipeline.export_batch(job, requests)
    texts = [str(line["body"]["messages"][-1]["content"]) for line in read_lines(requests)]
    order = [int(text.partition(", picture ")[2].partition(".")[0]) for text in texts]
    assert order == [*range(5, 200), *range(5)]


@pytest.mark.parametrize(("status", "said"), [(403, "requires another key"), (404, "no such model"), (405, "no such")])
@pytest.mark.parametrize("count", [1, 5, 200])
def test_a_refusal_of_everything_ends_the_run_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, said: str, count: int
) -> None:
    wire = wired(monkeypatch, lambda r: Said("no", status=status))
    with pytest.raises(InputError, match=said):
        ask(tmp_path, [f"{n}" for n in range(count)], concurrency=2)
    assert min(count, 20) <= len(wire.requests) <= min(count, 21)


def test_parameters_that_the_model_never_takes_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    wire = wired(monkeypatch, lambda r: Said("no max_tokens here", status=400))
    with pytest.raises(InputError, match="1,000 requests in a row were refused.*no max_tokens here"):
        ask(tmp_path, [f"{n}" for n in range(1500)])
    assert len(wire.requests) < 1020


@pytest.mark.parametrize("seconds", [10, 30, 60])
@pytest.mark.parametrize("concurrency", [1, 16, 64])
@pytest.mark.parametrize("trouble", [Said("down", status=503), Said(drop=True), Said("busy", status=429)])
def test_an_outage_of_up_to_a_minute_costs_no_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int, concurrency: int, trouble: Said
) -> None:
    begin: list[float] = []

    def away(request: Request) -> Said:
        begin.append(asyncio.get_running_loop().time())
        down = len(begin) >= 5 and begin[-1] - begin[4] < seconds
        return trouble if down else Said("here")

    wired(monkeypatch, away)
    assert ask(tmp_path, TEXTS, concurrency=concurrency) == dict.fromkeys(TEXTS, "here")
    assert begin[-1] - begin[4] >= seconds


def test_an_outage_that_lasts_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wire = wired(monkeypatch, lambda r: Said("down", status=503) if len(wire.requests) > 5 else Said("here"))
    with pytest.raises(InputError, match="20 calls in a row had no reply.*down"):
        ask(tmp_path, [f"{n}" for n in range(500)])
    assert wire.times[-1] - wire.times[5] > 60
    with Store(tmp_path / "calls.jsonl") as store:
        assert store.calls == 5


def test_refusals_between_failures_show_that_the_server_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wired(monkeypatch, lambda r: Said("no", status=500 if int(r.last) % 2 else 400))
    said = ask(tmp_path, [f"{n}" for n in range(100)], concurrency=1, retries=0)
    assert len(said) == 100


def test_a_fault_of_one_task_is_its_own(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that nobody thought of, in one task: the others are asked, kept and written."""
    real = pipeline.settle

    def settle(task: Any, *rest: Any) -> Any:
        if task.context.id == "p0007":
            raise MemoryError("too large")
        return real(task, *rest)

    monkeypatch.setattr(pipeline, "settle", settle)
    wired(monkeypatch, well)
    result = pipeline.run(job, URL)
    assert result.counts.total("accepted") == 199
    assert result.failures == {"p0007-detail": "fault: MemoryError (too large)"}
    assert read_lines(job.out.with_name("out.left_out.jsonl")) == [
        {"id": "p0007", "type": "detail", "outcome": "failed", "reason": "fault: MemoryError (too large)"}
    ]


def test_a_fault_while_asking_cancels_no_request_on_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_breaks(request: Request) -> Said:
        if request.last == "text 3":
            raise ZeroDivisionError("a fault")
        return Said("paid", seconds=5)

    wired(monkeypatch, one_breaks)
    said = ask(tmp_path, TEXTS[:8], concurrency=8)
    assert said.pop("text 3") == "no reply: fault: ZeroDivisionError (a fault)"
    assert set(said.values()) == {"paid"}


def test_half_a_character_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wired(monkeypatch, lambda r: Said("fine"))
    said = ask(tmp_path, ["a", "a \ud83d dog", "b"])
    assert said["a"] == said["b"] == "fine"
    assert "half a character" in said["a \ud83d dog"]


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"choices": [' + b"9" * 5000,
        b'{"choices": NaN}',
        b"\xef\xbb\xbf[]",
        b"\xff",
    ],
)
def test_a_body_of_any_kind_is_a_reply_or_a_failure_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    wired(monkeypatch, lambda r: Said(body=body) if r.last == "text 1" else Said("fine"))
    said = ask(tmp_path, TEXTS[:3])
    assert said["text 0"] == said["text 2"] == "fine"
    assert "text 1" in said
    with Store(tmp_path / "calls.jsonl") as store:
        assert store.calls == 3
    error = httpx.Response(500, content=body)
    wired(monkeypatch, lambda r: Said(body=error.content, status=500) if r.last == "bad" else Said("fine"))
    assert "no reply: 7 attempts failed" in ask(tmp_path, ["bad", "good"])["bad"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"error": {"message": "moderated", "code": 403}}', "status 403: moderated"),
        (b'{"error": {"message": "up \\ud83d"}}', "7 attempts failed, the last one with status 200: up \ufffd"),
        (b'{"choices": [{"error": {"message": "x", "code": 400}, "finish_reason": "error"}]}', "status 400: x"),
        (b'{"object": "error", "message": "y", "code": 422}', "status 422: y"),
    ],
)
def test_an_error_with_status_200_is_no_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: bytes, reason: str
) -> None:
    wired(monkeypatch, lambda r: Said(body=body) if r.last == "text 1" else Said("fine"))
    assert ask(tmp_path, TEXTS[:3], concurrency=1)["text 1"] == f"no reply: {reason}"
    with Store(tmp_path / "calls.jsonl") as store:
        assert store.calls == 2


def test_a_judge_asks_what_failed_last_and_one_fault_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wire = wired(monkeypatch, lambda r: Said("no", status=403) if r.last in ("case 1", "case 2") else Said("yes"))
    judge = Judge("m", URL, tmp_path / "calls.jsonl")
    calls = [judge.call("Judge.", text) for text in ("case 1", "half \ud83d", "case 2", "case 3")]
    assert judge.ask(calls).texts() == [None, None, None, "yes"]
    wire.requests.clear()
    more = [*calls, judge.call("Judge.", "case 4")]
    assert judge.ask(more).texts() == [None, None, None, "yes", "yes"]
    assert wire.requests[0].last == "case 4"
    printed = capsys.readouterr()
    assert printed.out == ""  # where the result goes
    assert "No reply from the judge to call 3 of 4: status 403: no" in printed.err
