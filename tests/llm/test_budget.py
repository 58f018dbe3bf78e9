"""Limits are kept whatever happens: a server that counts for itself is never asked for more."""

from __future__ import annotations

import asyncio
import json
import os
import random
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qllava.config import InputError
from qllava.data.contexts import Context
from qllava.llm.budget import Budget, most_prompt_tokens, most_tokens, prompt_tokens, text_tokens
from qllava.llm.client import Client
from qllava.llm.store import Call, Store
from qllava.synthesis import pipeline
from qllava.synthesis.pipeline import Job
from qllava.synthesis.prompting import Prompts
from qllava.synthesis.tasks import Asking, make_tasks
from tests.llm.server import Request, Said
from tests.llm.wire import QuickLoop, Wire

URL = "http://127.0.0.1:9/v1"
CHINESE = "\u4e00\u53ea\u68d5\u8272\u7684\u72d7\u5728\u8349\u5730\u4e0a\u5954\u8dd1\uff0c\u65c1\u8fb9\u6709\u4eba\u3002"
LIMIT = 60  # tokens of a reply


@pytest.fixture(autouse=True)
def no_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key or proxy of whoever runs the tests, and no waiting for the disk."""
    for name in list(os.environ):
        if name.startswith("OPENAI_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "fsync", lambda _: None)


class Meter(Wire):
    """A server whose vocabulary is as bad as one can be (a token a byte), and that has trouble of every kind."""

    def __init__(self, seed: int, trouble: float) -> None:
        super().__init__(self.say)
        self.rng, self.trouble = random.Random(seed), trouble
        self.tokens = 0

    def say(self, request: Request) -> Said:
        """Answer, or not; tokens are paid for every reply that is made, also when it does not arrive."""
        if self.rng.random() < self.trouble / 2:
            return Said("no", status=self.rng.choice([400, 403, 429, 500, 503]), seconds=self.rng.random())
        asked = sum(len(m["content"].encode()) for m in request.body["messages"]) + 20 * len(request.body["messages"])
        said = self.rng.randint(1, LIMIT)
        self.tokens += asked + said
        body: dict[str, Any] = {"choices": [{"message": {"content": "\u72d7" * said}, "finish_reason": "stop"}]}
        if self.rng.random() < 0.8:
            body["usage"] = {"prompt_tokens": asked, "completion_tokens": said}
        drop = self.rng.random() < self.trouble / 2
        return Said(body=json.dumps(body).encode(), drop=drop, seconds=self.rng.random())


def ask(path: Path, meter: Meter, count: int, **limits: Any) -> None:
    async def post(_: Client, content: bytes) -> httpx.Response:
        return await meter.post(content)

    async def run() -> None:
        with Store(path) as store:
            async with Client(store, URL, concurrency=8, retries=2, **limits) as teacher:

                async def one(number: int) -> None:
                    message = {"role": "user", "content": f"{CHINESE * (1 + number % 3)} {number}"}
                    await teacher.ask(Call("m", (message,), {"max_tokens": LIMIT}, "1"))

                await teacher.each(range(count), one, lambda *_: None)

    with pytest.MonkeyPatch.context() as patch, asyncio.Runner(loop_factory=QuickLoop) as runner:
        patch.setattr(Client, "_post", post)
        runner.run(run())


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    trouble=st.sampled_from([0.0, 0.3, 0.8]),
    max_tokens=st.integers(1, 9000),
    max_calls=st.integers(1, 40),
)
def test_no_limit_is_ever_exceeded(
    tmp_path_factory: pytest.TempPathFactory, seed: int, trouble: float, max_tokens: int, max_calls: int
) -> None:
    meter, path = Meter(seed, trouble), tmp_path_factory.mktemp("budget") / "calls.jsonl"
    for _ in range(2):  # the second run has what the first one left
        ask(path, meter, 30, max_tokens=max_tokens, max_calls=max_calls)
        assert meter.tokens <= max_tokens
        assert len(meter.requests) <= max_calls
    with Store(path) as store:
        assert store.requests == len(meter.requests)
        assert meter.tokens <= store.spent_tokens <= max_tokens


def test_a_limit_is_used_up(tmp_path: Path) -> None:
    """It stops because the next request may not fit, not earlier."""
    meter = Meter(1, 0.0)
    ask(tmp_path / "calls.jsonl", meter, 300, max_tokens=40_000)
    largest = most_tokens(Call("m", ({"role": "user", "content": f"{CHINESE * 3} 299"},), {"max_tokens": LIMIT}, "1"))
    with Store(tmp_path / "calls.jsonl") as store:
        assert 40_000 - largest < store.spent_tokens <= 40_000
    few = Meter(1, 0.0)
    ask(tmp_path / "few.jsonl", few, 300, max_calls=17)
    assert len(few.requests) == 17


def test_attempts_that_failed_are_requests(tmp_path: Path) -> None:
    meter = Meter(0, 0.0)
    meter.answer = lambda request: Said("down", status=500)
    ask(tmp_path / "calls.jsonl", meter, 5, max_calls=1)
    ask(tmp_path / "calls.jsonl", meter, 5, max_calls=1)
    assert len(meter.requests) == 1


def test_a_connection_that_never_was_is_no_request(tmp_path: Path) -> None:
    meter = Meter(0, 0.0)
    real, refused = meter.post, []

    async def post(content: bytes) -> httpx.Response:
        if meter.requests and len(refused) < 8:
            refused.append(content)
            raise httpx.ConnectError("refused")
        return await real(content)

    meter.post = post  # type: ignore[method-assign]
    ask(tmp_path / "calls.jsonl", meter, 30, max_calls=30)
    assert len(meter.requests) == 30
    assert refused


def test_a_server_that_adds_more_than_is_known_is_believed_at_once(tmp_path: Path) -> None:
    """A gateway with a long message of its own: the first requests show it, and it is counted from then on."""
    meter = Meter(0, 0.0)

    def adds(request: Request) -> Said:
        meter.tokens += 5000
        usage = {"prompt_tokens": 4990, "completion_tokens": 10}
        body = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}], "usage": usage}
        return Said(body=json.dumps(body).encode(), seconds=1.0)

    meter.answer = adds
    ask(tmp_path / "calls.jsonl", meter, 100, max_tokens=60_000)
    assert 40_000 < meter.tokens <= 60_000


def test_a_limit_of_tokens_needs_replies_that_have_one(tmp_path: Path) -> None:
    async def run() -> None:
        with Store(tmp_path / "calls.jsonl") as store:
            async with Client(store, URL, max_tokens=1000) as teacher:
                await teacher.ask(Call("m", ({"role": "user", "content": "?"},), {}, "1"))

    with pytest.raises(InputError, match="a limit for the length of a reply; give max_tokens"):
        asyncio.run(run())


@pytest.mark.parametrize(
    "text", ["A dog runs.", CHINESE, "\U0001f415" * 9, "\u0e2a\u0e38\u0e19\u0e31\u0e02", "\x00\x01"]
)
def test_the_most_is_no_less_than_a_token_a_byte(text: str) -> None:
    call = Call("m", ({"role": "user", "content": text},), {"max_tokens": 50}, "1")
    assert most_prompt_tokens(call) >= len(text.encode()) + 100 >= prompt_tokens(call)
    assert most_tokens(call) == most_prompt_tokens(call) + 50
    assert text_tokens(CHINESE) == len(CHINESE)


def test_what_is_estimated_at_most_bounds_what_a_run_asks_and_pays(tmp_path: Path) -> None:
    """Every reply breaks a rule, is as long as allowed, and is asked for again; half of the attempts fail first."""
    contexts = [Context(f"{n}", f"{n}.jpg", (f"{CHINESE} {n}",), ()) for n in range(20)]
    asking = Asking("m", Prompts(), {"max_tokens": LIMIT})
    job = Job(make_tasks(contexts, ("detail",)), asking, tmp_path / "out.json", tmp_path / "calls.jsonl")
    expected = pipeline.estimate(job)
    meter = Meter(0, 0.0)

    def worst(request: Request) -> Said:
        if request.before == 0:
            return Said("busy", status=503)
        asked = sum(len(m["content"].encode()) for m in request.body["messages"])
        meter.tokens += asked + LIMIT
        text = "The bounding box. The caption. <image> zebra toothbrush 0.123 \ufffd" + "\u72d7" * 15
        body = {
            "choices": [{"message": {"content": text}, "finish_reason": "length"}],
            "usage": {"prompt_tokens": asked, "completion_tokens": LIMIT},
        }
        return Said(body=json.dumps(body).encode())

    meter.answer = worst

    async def post(_: Client, content: bytes) -> httpx.Response:
        return await meter.post(content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Client, "_post", post)
        result = pipeline.run(job, URL, first_rest=0.001)
    assert result.calls == expected["calls_at_most"] == 40
    assert len(meter.requests) == 80 <= expected["requests_at_most"]
    assert meter.tokens == result.tokens <= expected["tokens_at_most"]
    after = pipeline.estimate(job)
    assert (after["requests_so_far"], after["tokens_so_far"], after["tokens_at_most"]) == (80, meter.tokens, 0)


def test_what_is_under_way_counts_at_what_a_reply_has_shown() -> None:
    """Three requests are open when the first reply comes and costs ten times its bound: the others will too."""

    async def run() -> None:
        budget = Budget(None, 10_000, 0, 0)
        for _ in range(3):
            await budget.reserve(300)
        budget.settle(300, 3000, sent=True)
        with pytest.raises(TimeoutError):  # 3,000 are spent, 6,000 are under way, and 3,000 more do not fit
            async with asyncio.timeout(0.01):
                await budget.reserve(300)
        for _ in range(2):
            budget.settle(300, 300, sent=True)
        await budget.reserve(300)
        assert budget.open == 1

    asyncio.run(run())
