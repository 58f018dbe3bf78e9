"""Ask a language model behind any OpenAI-compatible address, many calls at a time, and pay for none twice.

    with Store(path) as store:
        async with Teacher(store, "http://127.0.0.1:8000/v1", concurrency=64) as teacher:
            reply = await teacher.ask(Call("a-model", messages, {"temperature": 0.7}, version="1"))

`ask` looks into the store first, sends what is not there, and keeps the reply before it returns it. What passes (a
broken connection, 429, 5xx) is tried again, after twice the time each time, or when the server says (`Retry-After`).
What will not pass (a wrong key, no such model, nobody there) ends the run at once: a million calls would fail alike.

The key comes from the environment (OPENAI_API_KEY), goes into the request's header, and nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Iterable
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, TypeVar

import httpx

from qllava.config import InputError
from qllava.synthesis.store import Call, Reply, Store

T = TypeVar("T")

OPENAI = "https://api.openai.com/v1"
CHARACTERS_PER_TOKEN = 4  # English text in today's vocabularies, roughly; counts that the server sends take its place
PICTURE_TOKENS = 1000  # that a picture costs at a server, at the most that is usual
UNLIMITED_REPLY = 1024  # tokens that a reply without a limit is taken to need at most, for the budget

_LONGEST_REST = 60.0  # seconds between two attempts, where the server names none
_LONGEST_WAIT = 900.0  # a server that wants a longer pause than this has a quota of the day: the run ends
_HOPELESS = 20  # calls in a row that failed for good: the rest would, too
_CONNECTIONS = 16  # of one client
_PASSING = {408, 409, 425, 429, *range(500, 600)}


class Unanswered(Exception):
    """One call has no reply after every attempt; `status` is the server's last one, None without any."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


class Stopped(Exception):
    """Nothing more is asked: the next call would go over the budget, or the run is being ended."""


class Teacher:
    """A server, the store of its replies, and a budget. Used by one event loop, inside `async with`.

    concurrency: requests at a time. timeout: seconds without a byte from the server. retries: attempts after the first.
    max_calls, max_tokens: never more than so many in the store, those of earlier runs counted.
    first_rest: seconds before the second attempt.
    """

    def __init__(
        self,
        store: Store,
        base_url: str | None = None,
        *,
        concurrency: int = 16,
        timeout: float = 300.0,
        retries: int = 6,
        max_calls: int | None = None,
        max_tokens: int | None = None,
        first_rest: float = 0.5,
    ) -> None:
        self.store = store
        self.concurrency = concurrency
        self._retries, self._first_rest = retries, first_rest
        self._max_calls, self._max_tokens = max_calls, max_tokens
        self._secret = _key()
        self._url = _address(base_url, bool(self._secret))
        self._clients = _clients(concurrency, timeout, self._secret)
        # A client stands here once for each connection that it may open.
        self._free: asyncio.LifoQueue[httpx.AsyncClient] = asyncio.LifoQueue()
        for number in range(concurrency):
            self._free.put_nowait(self._clients[number // _CONNECTIONS])
        self._running: dict[str, asyncio.Task[Reply]] = {}  # by key: one call is on its way once
        self._open_calls = self._open_tokens = 0  # on their way, counted at the most that they can cost
        self._settled, self._stopping = asyncio.Event(), asyncio.Event()
        self._resume = 0.0  # the moment (monotonic) before which the server wants no request
        self._answered = self._lost_in_a_row = 0
        self._error: BaseException | None = None

    async def __aenter__(self) -> Teacher:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self._clients:
            await client.aclose()

    async def each(self, items: Iterable[T], work: Callable[[T], Awaitable[None]]) -> None:
        """`work` on every item, `concurrency` at a time; `work` asks, and deals with Unanswered itself.

        At the end of the budget, an InputError of any `work`, or the first Ctrl-C, nothing new is begun; requests that
        are on their way are awaited and kept, for they are paid. Then the error is raised; the end of the budget is
        none. A second Ctrl-C ends at once.
        """
        waiting = iter(items)

        async def worker() -> None:
            for item in waiting:
                try:
                    await work(item)
                except Stopped:
                    self._stop(None)
                except InputError as error:
                    self._stop(error)
                if self._stopping.is_set():
                    return

        loop = asyncio.get_running_loop()

        def interrupt() -> None:
            loop.remove_signal_handler(signal.SIGINT)
            self._stop(KeyboardInterrupt())

        caught = False
        try:
            loop.add_signal_handler(signal.SIGINT, interrupt)
            caught = True
        except (RuntimeError, ValueError):  # not in the main thread, which alone gets signals
            pass
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self.concurrency):
                    group.create_task(worker())
        finally:
            if caught:
                loop.remove_signal_handler(signal.SIGINT)
        if self._error is not None:
            raise self._error

    async def ask(self, call: Call) -> Reply:
        """The reply to a call, kept. Raises Unanswered, Stopped, or InputError where no call can succeed."""
        kept = self.store.get(call.key)
        if kept is not None:
            return kept
        task = self._running.get(call.key)
        if task is None:
            task = self._running[call.key] = asyncio.create_task(self._ask(call))
            task.add_done_callback(lambda _: self._running.pop(call.key))
        return await task

    async def _ask(self, call: Call) -> Reply:
        tokens = most_tokens(call)
        await self._reserve(tokens)
        try:
            reply = read_reply(await self._fetch(call), call)
            await asyncio.to_thread(self.store.add, (call, reply))
        except Unanswered as error:
            self._lost_in_a_row += 1
            if self._lost_in_a_row >= _HOPELESS:
                raise InputError(
                    f"{self._lost_in_a_row} calls in a row had no reply, the last one: {error}. Mend what is wrong and "
                    "start again; what was answered is kept."
                ) from error
            raise
        finally:
            self._open_calls -= 1
            self._open_tokens -= tokens
            self._settled.set()
        self._lost_in_a_row = 0
        return reply

    def _stop(self, error: BaseException | None) -> None:
        self._error = self._error or error
        self._stopping.set()
        self._settled.set()

    async def _reserve(self, tokens: int) -> None:
        """Take a call's highest cost from the budget; where that is too much, wait for what others really cost."""
        while not self._fits(tokens):
            if self._open_calls == 0:
                raise Stopped
            self._settled.clear()
            await self._settled.wait()
        if self._stopping.is_set():
            raise Stopped
        self._open_calls += 1
        self._open_tokens += tokens

    def _fits(self, tokens: int) -> bool:
        if self._max_calls is not None and self.store.calls + self._open_calls + 1 > self._max_calls:
            return False
        return self._max_tokens is None or self.store.tokens + self._open_tokens + tokens <= self._max_tokens

    async def _fetch(self, call: Call) -> bytes:
        """The body of a reply. Raises as `ask`."""
        failures, answered = 0, self._answered
        for attempt in itertools.count():
            # Not all at the same moment, or the server would have to turn most of them away again.
            await self._rest((self._resume - time.monotonic()) * random.uniform(1.0, 1.2))
            status = wait = None
            try:
                response = await self._post(call)
            except httpx.RequestError as error:
                reason = f"{type(error).__name__} ({error})" if str(error) else type(error).__name__
                if isinstance(error, httpx.ConnectError) and not self._answered:
                    raise InputError(
                        f"{self._url}: nobody answers there ({reason}); start the server or correct --base-url."
                    ) from error
            else:
                status, wait = response.status_code, _retry_after(response.headers.get("retry-after"))
                if status == 200 and not _is_error(response.content):
                    self._answered += 1
                    return response.content
                reason = f"status {status}: {self._said(response)}"
                self._judge(response, reason)
            if wait is not None:
                self._resume = max(self._resume, time.monotonic() + wait)
            # To be told to come later is no failure while others are served.
            failures += not (status == 429 and self._answered > answered)
            answered = self._answered
            if failures > self._retries:
                raise Unanswered(f"{attempt + 1} attempts failed, the last one with {reason}", status)
            if not wait:
                most = min(_LONGEST_REST, self._first_rest * 2.0 ** min(attempt, 20))
                await self._rest(random.uniform(0.5, 1.0) * most)
        raise AssertionError("the attempts are counted without an end")

    async def _post(self, call: Call) -> httpx.Response:
        """Send a call over a free connection."""
        client = await self._free.get()
        try:
            return await client.post(self._url, json=call.body())
        finally:
            self._free.put_nowait(client)

    async def _rest(self, seconds: float) -> None:
        """Wait; raises Stopped when the run is being ended, for then nothing is to be sent any more."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), seconds)
        if self._stopping.is_set():
            raise Stopped

    def _judge(self, response: httpx.Response, reason: str) -> None:
        """Raise for an answer that another attempt will not change."""
        status = response.status_code
        if status in (401, 403):
            key = "the key in OPENAI_API_KEY is not accepted" if self._secret else "OPENAI_API_KEY is not set"
            raise InputError(f"{self._url} wants another key ({reason}): {key}; set it to a valid one.")
        if status in (404, 405) or 300 <= status < 400:
            raise InputError(
                f"{self._url} has no such address or no such model ({reason}); correct --base-url, which mostly ends "
                "with /v1, or the model's name."
            )
        if status == 402 or (status == 429 and b"insufficient_quota" in response.content):
            raise InputError(f"{self._url}: the account has no credit left ({reason}); add to it and start again.")
        wait = _retry_after(response.headers.get("retry-after"))
        if wait is not None and wait > _LONGEST_WAIT:
            raise InputError(f"{self._url} wants no request for {wait / 60:,.0f} minutes ({reason}); start again then.")
        if status not in _PASSING and status != 200:
            raise Unanswered(reason, status)

    def _said(self, response: httpx.Response) -> str:
        """What the server says is wrong, in one short line that never holds the key."""
        said = response.text
        try:
            body = response.json()
            error = body.get("error", body)
            said = str(error.get("message", error)) if isinstance(error, dict) else str(error)
        except (ValueError, AttributeError):
            pass
        if self._secret:
            said = said.replace(self._secret, "(the key)")
        return " ".join(said.split())[:300] or "no reason given"


def most_tokens(call: Call) -> int:
    """What a call can cost: its text at four characters a token, and the longest reply that it allows."""
    limits = [call.parameters.get(name) for name in ("max_completion_tokens", "max_tokens")]
    return prompt_tokens(call) + next((n for n in limits if isinstance(n, int)), UNLIMITED_REPLY)


def prompt_tokens(call: Call) -> int:
    """About how many tokens a call has."""
    contents = [message["content"] for message in call.messages]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    texts = [content for content in contents if isinstance(content, str)] + [part.get("text", "") for part in parts]
    pictures = len([part for part in parts if part["type"] == "image_url"])
    return text_tokens("".join(texts)) + PICTURE_TOKENS * pictures


def text_tokens(text: str) -> int:
    """About how many tokens a text has."""
    return -(-len(text) // CHARACTERS_PER_TOKEN)


def read_reply(body: bytes | Any, call: Call) -> Reply:
    """A body of /chat/completions (as it arrived, or JSON that was read) as a reply, counted by its text if need be.

    A body that is none is a reply all the same, for it was paid: the whole text, with "unreadable" for a reason.
    """
    raw = (
        body.decode(errors="replace")
        if isinstance(body, bytes)
        else body
        if isinstance(body, str)
        else json.dumps(body)
    )
    try:
        read = json.loads(raw)
        choice = read["choices"][0]
        content, refusal = choice["message"].get("content"), choice["message"].get("refusal")
        if not isinstance(content, str | None) or not isinstance(refusal, str | None):
            raise TypeError("content and refusal are text or null")
        reason, text = str(choice.get("finish_reason") or "stop"), content or ""
    except (ValueError, LookupError, TypeError, AttributeError):
        read, refusal, reason, text = {}, None, "unreadable", raw
    usage = read.get("usage") or {}
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    asked, said = (n if isinstance(n, int) else None for n in counts)
    return Reply(
        text=_whole(text),
        finish_reason=reason,
        prompt_tokens=prompt_tokens(call) if asked is None else asked,
        completion_tokens=text_tokens(text) if said is None else said,
        refusal=None if refusal is None else _whole(refusal),
    )


def _whole(text: str) -> str:
    """Text without halves of characters, which JSON can spell and no file can hold."""
    return text.encode(errors="replace").decode()


def _clients(connections: int, timeout: float, secret: str) -> list[httpx.AsyncClient]:
    """Clients for so many connections: a few for each, as a pool's work for a request grows with its square."""
    certificates = httpx.create_ssl_context()
    return [
        httpx.AsyncClient(
            headers={"Authorization": f"Bearer {secret}"} if secret else {},
            timeout=httpx.Timeout(timeout, connect=min(timeout, 30.0), pool=None),
            limits=httpx.Limits(max_connections=_CONNECTIONS, max_keepalive_connections=_CONNECTIONS),
            verify=certificates,
        )
        for _ in range(0, connections, _CONNECTIONS)
    ]


def _is_error(content: bytes) -> bool:
    """Whether a server says with status 200 that something went wrong, as some routers do."""
    try:
        read = json.loads(content)
    except ValueError:
        return False
    return isinstance(read, dict) and bool(read.get("error")) and not read.get("choices")


def _key() -> str:
    """The key, or nothing. Raises InputError for one that no header can hold, without showing it."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and (key.isprintable() or not key)):
        raise InputError("OPENAI_API_KEY holds characters that no key has; copy it again.")
    return key


def _address(base_url: str | None, has_key: bool) -> str:
    """Where requests go. Raises InputError for what is no address, and for OpenAI's own without a key."""
    url = (base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI).rstrip("/")
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL:
        address = httpx.URL("")
    if address.scheme not in ("http", "https") or not address.host:
        raise InputError(f"{url} is no address of a server, which looks like http://127.0.0.1:8000/v1; correct it.")
    if url == OPENAI and not has_key:
        raise InputError(f"{url} needs a key: set OPENAI_API_KEY, or name another server with --base-url.")
    return f"{url}/chat/completions"


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait by the header Retry-After, a number or a date; None where there is none that can be read."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
