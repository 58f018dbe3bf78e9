"""The client: every call is answered once, what passes is tried again, what does not pass ends the run."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
from base64 import b64encode
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from qllava.config import InputError
from qllava.evaluation.asking import Judge
from qllava.llm.budget import Stopped, most_tokens
from qllava.llm.client import Client
from qllava.llm.completions import read_reply
from qllava.llm.store import Call, Reply, Store
from tests.llm.server import ChatServer, Request, Said


@pytest.fixture(autouse=True)
def no_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, address or proxy of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith("OPENAI_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


def call(text: str) -> Call:
    return Call("m", ({"role": "user", "content": text},), {"max_tokens": 50}, "1")


def ask(path: Path, url: str | None, texts: list[str], **limits: Any) -> dict[str, str]:
    """Ask each text; its reply, or why there is none."""
    said: dict[str, str] = {}

    async def run() -> None:
        with Store(path / "calls.jsonl") as store:
            async with Client(store, url, **{"first_rest": 0.005, **limits}) as teacher:

                async def one(text: str) -> None:
                    said[text] = (await teacher.ask(call(text))).text

                def failed(text: str, reason: str) -> None:
                    said[text] = f"no reply: {reason}"

                await teacher.each(texts, one, failed)

    asyncio.run(run())
    return said


def echo(request: Request) -> Said:
    return Said(f"re: {request.last}")


def first(trouble: Said) -> Callable[[Request], Said]:
    """A server that is in trouble when it is asked something for the first time."""
    return lambda request: trouble if request.before == 0 else echo(request)


TEXTS = [f"text {n}" for n in range(12)]
ANSWERS = {text: f"re: {text}" for text in TEXTS}


def test_a_call_that_was_answered_is_not_asked_again(tmp_path: Path) -> None:
    with ChatServer(echo) as server:
        assert ask(tmp_path, server.url, TEXTS) == ANSWERS
        assert ask(tmp_path, server.url, [*TEXTS, "new"]) == {**ANSWERS, "new": "re: new"}
    assert server.asked.total() == len(TEXTS) + 1


def test_the_same_call_by_two_at_once_is_asked_once(tmp_path: Path) -> None:
    with ChatServer(lambda request: Said("slow", seconds=0.1)) as server:
        assert ask(tmp_path, server.url, ["same"] * 20) == {"same": "slow"}
    assert server.asked.total() == 1


@pytest.mark.parametrize(
    "trouble",
    [
        Said("busy", status=429, headers={"Retry-After": "0.05"}),
        Said("busy", status=429, headers={"Retry-After": formatdate(time.time() - 5, usegmt=True)}),
        Said("busy", status=429, headers={"Retry-After": "soon"}),
        Said("broken", status=500),
        Said(status=503, body=b"<html>"),
        Said("timed out", status=408),
        Said("half", drop=True),
        Said(body=b'{"error": {"message": "upstream", "code": 502}}'),
    ],
    ids=["seconds", "date", "neither", "500", "html", "408", "dropped", "error with 200"],
)
def test_trouble_that_passes_is_tried_again(tmp_path: Path, trouble: Said) -> None:
    with ChatServer(first(trouble)) as server:
        assert ask(tmp_path, server.url, TEXTS, concurrency=4) == ANSWERS
    assert server.asked.total() == 2 * len(TEXTS)


def test_nothing_is_sent_before_the_server_wants_it(tmp_path: Path) -> None:
    """Retry-After holds for every call, not for the one that was told."""
    times: list[float] = []

    def busy_once(request: Request) -> Said:
        times.append(time.monotonic())
        return Said("busy", status=429, headers={"Retry-After": "1"}) if len(times) == 1 else Said("ok")

    with ChatServer(busy_once) as server:
        ask(tmp_path, server.url, ["a", "b", "c"], concurrency=1)
    assert times[1] - times[0] >= 1


def test_to_be_told_to_wait_is_no_failure_while_others_are_served(tmp_path: Path) -> None:
    def unlucky(request: Request) -> Said:
        if request.last == "unlucky" and request.before < 6:
            return Said("busy", status=429)
        return Said("served", seconds=0.02)

    with ChatServer(unlucky) as server:
        others = [f"text {n}" for n in range(100)]
        said = ask(tmp_path, server.url, ["unlucky", *others], retries=3, concurrency=4, first_rest=0.01)
        assert said["unlucky"] == "served"
        server.answer = lambda request: Said("busy", status=429)
        assert "5 attempts failed" in ask(tmp_path, server.url, ["alone"], retries=4)["alone"]


def test_a_call_that_never_succeeds_does_not_end_the_run(tmp_path: Path) -> None:
    with ChatServer(lambda r: Said("broken", status=500) if r.last == "text 3" else echo(r)) as server:
        said = ask(tmp_path, server.url, TEXTS, retries=2)
        assert said.pop("text 3") == "no reply: 3 attempts failed, the last one with status 500: broken"
        assert said == {text: reply for text, reply in ANSWERS.items() if text != "text 3"}
        server.answer = echo
        assert ask(tmp_path, server.url, TEXTS) == ANSWERS


def test_a_request_that_the_server_refuses_is_not_tried_again(tmp_path: Path) -> None:
    with ChatServer(lambda r: Said("too long", status=400) if r.last == "text 3" else echo(r)) as server:
        assert ask(tmp_path, server.url, TEXTS)["text 3"] == "no reply: status 400: too long"
    assert server.asked.total() == len(TEXTS)


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (Said("bad key", status=401), "OPENAI_API_KEY is not set"),
        (Said("bad key", status=403), "OPENAI_API_KEY is not set"),
        (Said("no model m", status=404), "no such model.*no model m"),
        (Said(status=307, headers={"Location": "/elsewhere"}), "no such address"),
        (Said("pay", status=402), "no credit"),
        (Said(status=429, body=b'{"error": {"message": "x", "code": "insufficient_quota"}}'), "no credit"),
        (Said("tomorrow", status=429, headers={"Retry-After": "86400"}), "no request for 1,440 minutes"),
    ],
    ids=["401", "403", "404", "redirect", "402", "quota", "a day"],
)
def test_what_will_not_pass_ends_the_run_at_once(tmp_path: Path, trouble: Said, said: str) -> None:
    with ChatServer(lambda request: trouble) as server, pytest.raises(InputError, match=said):
        ask(tmp_path, server.url, [f"{n}" for n in range(200)], concurrency=2)
    # What may be of one request only is known to be of all after twenty.
    assert server.asked.total() <= (21 if trouble.status in (403, 404, 307) else 2)


def test_nobody_there_ends_the_run_at_once(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(InputError, match="No server answers at"):
            ask(tmp_path, url, TEXTS)


def test_many_failures_in_a_row_end_the_run(tmp_path: Path) -> None:
    with ChatServer(lambda request: Said("broken", status=500)) as server:
        with pytest.raises(InputError, match="20 calls in a row had no reply.*broken"):
            ask(tmp_path, server.url, [f"{n}" for n in range(500)], retries=1, concurrency=4)
        assert server.asked.total() < 60


def test_failures_with_replies_between_them_do_not_end_the_run(tmp_path: Path) -> None:
    def every_second(request: Request) -> Said:
        return echo(request) if int(request.last) % 2 else Said("no", status=400)

    with ChatServer(every_second) as server:
        assert len(ask(tmp_path, server.url, [f"{n}" for n in range(60)], concurrency=1)) == 60


def test_a_server_that_goes_away_ends_the_run_and_what_it_said_is_kept(tmp_path: Path) -> None:
    def leaves(request: Request) -> Said:
        if server.asked.total() == 10:
            server.leave()
        return echo(request)

    with ChatServer(leaves) as server, pytest.raises(InputError, match="20 calls in a row had no reply"):
        ask(tmp_path, server.url, [f"{n}" for n in range(100)], concurrency=2, retries=1)
    with Store(tmp_path / "calls.jsonl") as store:
        assert 9 <= store.calls <= 11


def test_what_was_on_its_way_when_the_run_ended_is_kept(tmp_path: Path) -> None:
    """A wrong answer to one call must not throw away the replies to others that are paid."""

    def one_ends_it(request: Request) -> Said:
        return Said("gone", status=401, seconds=0.1) if request.last == "text 0" else Said("paid", seconds=0.3)

    with ChatServer(one_ends_it) as server, pytest.raises(InputError):
        ask(tmp_path, server.url, TEXTS, concurrency=6)
    with Store(tmp_path / "calls.jsonl") as store:
        assert store.calls == server.paid.total() == 5


def test_a_budget_of_calls_is_of_the_store(tmp_path: Path) -> None:
    with ChatServer(lambda request: Said("ok", seconds=0.01)) as server:
        assert len(ask(tmp_path, server.url, TEXTS, max_calls=5, concurrency=8)) == 5
        assert len(ask(tmp_path, server.url, TEXTS, max_calls=5)) == 5
        assert server.asked.total() == 5
        assert len(ask(tmp_path, server.url, TEXTS, max_calls=7)) == 7
    assert server.asked.total() == server.paid.total() == 7


def test_a_budget_of_tokens_is_never_exceeded_and_used_up(tmp_path: Path) -> None:
    text = "word " * 20
    with ChatServer(lambda request: Said("one two three", seconds=0.005)) as server:
        ask(tmp_path, server.url, [f"{text}{n}" for n in range(100)], max_tokens=1000, concurrency=20)
    with Store(tmp_path / "calls.jsonl") as store:
        assert 1000 - most_tokens(call(f"{text}99")) < store.tokens <= 1000


def test_a_failed_call_gives_its_tokens_back_and_stays_a_request(tmp_path: Path) -> None:
    cost = most_tokens(call(TEXTS[0]))
    with ChatServer(lambda r: Said("no", status=400) if r.last in TEXTS[:6] else echo(r)) as server:
        said = ask(tmp_path, server.url, TEXTS, max_calls=9, max_tokens=2 * cost, concurrency=2)
        assert sum(not reply.startswith("no reply") for reply in said.values()) == 3
        assert server.asked.total() == 9


def test_the_key_goes_into_the_header_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with ChatServer(echo) as server:
        ask(tmp_path, server.url, ["a"])
        assert server.requests[0].headers["authorization"] == "Bearer sk-very-secret"
        server.answer = lambda request: Said("wrong key sk-very-secret", status=401)
        with pytest.raises(InputError, match=r"wrong key \(the key\)\): the key in OPENAI_API_KEY") as caught:
            ask(tmp_path, server.url, ["b"])
    assert "secret" not in str(caught.value)
    assert all(b"secret" not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://", "http://host:eighty/v1", "ftp://127.0.0.1/v1"])
def test_an_address_must_be_one(tmp_path: Path, url: str) -> None:
    with pytest.raises(InputError, match="is not the address of a server"):
        ask(tmp_path, url, ["a"])


def test_openai_needs_a_key_and_the_environment_may_name_another_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="needs a key"):
        ask(tmp_path, None, ["a"])
    with ChatServer(echo) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/")
        assert ask(tmp_path, None, ["a"]) == {"a": "re: a"}


def test_a_key_that_no_header_can_hold_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\u201csecret\u201d")
    with pytest.raises(InputError, match="contains characters that cannot be part of an API key") as caught:
        ask(tmp_path, "http://127.0.0.1:9/v1", ["a"])
    assert "secret" not in str(caught.value)


SECRET = "pa55/w\u00f6rd"


@pytest.mark.parametrize("spelled", ["pa55%2Fw%C3%B6rd"])
def test_a_password_in_the_address_is_sent_and_never_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, spelled: str
) -> None:
    caplog.set_level("DEBUG")
    header = "Basic " + b64encode(f"me:{SECRET}".encode()).decode()
    shown = [SECRET, spelled, header[6:]]

    def repeats(request: Request) -> Said:
        assert request.headers["authorization"] == header
        said = f"not for me:{SECRET} at http://me:{spelled}@host, {header}"
        return echo(request) if request.last == "a" else Said(said, status=400 if request.last == "b" else 401)

    with ChatServer(repeats) as server:
        url = server.url.replace("//", f"//me:{spelled}@")
        said = ask(tmp_path, url, ["a", "b"])
        with pytest.raises(InputError) as caught:
            ask(tmp_path, url, ["c"])
        judge = Judge("m", url, tmp_path / "judged.jsonl")
        record = json.dumps(judge.ask([judge.call("Judge.", "a")]).to_json()) + repr(judge)
    with pytest.raises(InputError, match="No server answers") as nobody:
        ask(tmp_path, f"http://me:{spelled}@127.0.0.1:9/v1", ["d"])
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()).decode()
    texts = [str(said), str(caught.value), str(nobody.value), record, written, caplog.text, *capsys.readouterr()]
    assert said["a"] == "re: a"
    assert "user and password of --base-url" in str(caught.value)
    assert not [text for text in texts for secret in shown if secret in text]


@pytest.mark.parametrize(
    "url",
    [
        "ftp://me:secret@host/v1",
        "http://me:secret@host:eighty/v1",
        "https://me@host/v1?key=secret",
        "//:secret@",
        "me:secret@host/v1",
        "http://me:a/secret@host/v1",
        "http://me:a//secret@host/v1",
    ],
)
def test_an_address_that_is_none_is_shown_without_its_password(tmp_path: Path, url: str) -> None:
    with pytest.raises(InputError, match="is not the address of a server") as caught:
        ask(tmp_path, url, ["a"])
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("proxy", "said"),
    [("socks5://me:secret@127.0.0.1:1080", "pip install socksio"), ("gopher://me:secret@h:1", "cannot be used")],
)
def test_a_proxy_that_cannot_be_used_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: str, said: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.setitem(sys.modules, "socksio", None)  # as where it is not installed
    with pytest.raises(InputError, match=said) as caught:
        ask(tmp_path, "http://127.0.0.1:9/v1", ["a"])
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_body_that_cannot_be_unpacked_is_tried_again(tmp_path: Path) -> None:
    with ChatServer(first(Said(headers={"Content-Encoding": "gzip"}))) as server:
        assert ask(tmp_path, server.url, ["a"]) == {"a": "re: a"}


def test_a_timeout_is_tried_again(tmp_path: Path) -> None:
    with ChatServer(lambda r: Said("late", seconds=0.5 if r.before == 0 else 0.0)) as server:
        assert ask(tmp_path, server.url, ["a"], timeout=0.2) == {"a": "late"}


def test_five_hundred_at_once_none_lost_none_doubled(tmp_path: Path) -> None:
    texts = [f"text {n}" for n in range(500)]
    with ChatServer(lambda request: Said(f"re: {request.last}", seconds=0.2)) as server:
        assert ask(tmp_path, server.url, texts, concurrency=500) == {text: f"re: {text}" for text in texts}
    assert set(server.asked.values()) == set(server.paid.values()) == {1}
    assert len(server.paid) == 500
    assert server.most_busy > 100
    with Store(tmp_path / "calls.jsonl") as store:
        assert store.calls == 500


MOST = most_tokens(call("abcd")) - 50
BODY: dict[str, Any] = {"choices": [{"message": {"content": "Hi."}, "finish_reason": "stop"}]}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({**BODY, "usage": {"prompt_tokens": 7, "completion_tokens": 9}}, Reply("Hi.", "stop", 7, 9)),
        (BODY, Reply("Hi.", "stop", MOST, 3)),
        ({**BODY, "usage": None}, Reply("Hi.", "stop", MOST, 3)),
        ({**BODY, "usage": {"prompt_tokens": True, "completion_tokens": -1}}, Reply("Hi.", "stop", MOST, 3)),
        ({**BODY, "usage": {"prompt_tokens": 1e300, "completion_tokens": 10**40}}, Reply("Hi.", "stop", MOST, 3)),
        ({**BODY, "usage": {"prompt_tokens": float("nan")}}, Reply("Hi.", "stop", MOST, 3)),
        ({"choices": [{"message": {"content": None, "refusal": "No."}}]}, Reply("", "stop", MOST, 0, "No.")),
        ({"choices": [{"message": {"content": "\ud83d half"}}]}, Reply("\ufffd half", "stop", MOST, 6)),
        ({"choices": [{"message": {"content": "x" * 99}}]}, Reply("x" * 99, "stop", MOST, 50)),
        ({"choices": []}, Reply('{"choices": []}', "unreadable", MOST, 15)),
        ({"choices": [{"message": {"content": 3}}]}, None),
        ({"choices": [{"message": {"content": [{"type": "poem"}, 3]}}]}, None),
        ([], Reply("[]", "unreadable", MOST, 2)),
    ],
)
def test_a_body_that_arrived_is_a_reply_whatever_it_holds(body: Any, expected: Reply | None) -> None:
    read = read_reply(json.dumps(body).encode(), call("abcd"))
    assert read == expected if expected else read.finish_reason == "unreadable"
    assert read_reply(body, call("abcd")) == read
    json.dumps(read.text, ensure_ascii=False).encode()


def test_stopped_is_raised_to_who_asks_without_each(tmp_path: Path) -> None:
    async def run(url: str) -> None:
        with Store(tmp_path / "calls.jsonl") as store:
            async with Client(store, url, max_calls=1) as teacher:
                await teacher.ask(call("a"))
                with pytest.raises(Stopped):
                    await teacher.ask(call("b"))

    with ChatServer(echo) as server:
        asyncio.run(run(server.url))
