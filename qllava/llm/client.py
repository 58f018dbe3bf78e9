"""Client of a language model behind an OpenAI-compatible address: many calls at a time, none paid twice.

    with Store(path) as store:
        async with Client(store, "http://127.0.0.1:8000/v1", concurrency=64) as client:
            reply = await client.ask(Call("a-model", messages, {"temperature": 0.7}, version="1"))

`ask` looks into the store first, sends the call if it is not there, and stores the reply before it returns it.
Temporary failures (a broken connection, 429, 5xx) are tried again, after twice the pause each time, or when the server
says (`Retry-After`). `refusals` decides what a missing reply means for the call and for the run, `budget` what may be
spent.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

import httpx

from qllava.config import InputError
from qllava.llm.address import address_of, connections_of
from qllava.llm.budget import Budget, Stopped, check_bounded, most_tokens
from qllava.llm.completions import error_of, read_json, read_reply
from qllava.llm.patience import Patience
from qllava.llm.refusals import Standing, Trouble, Unanswered, no_server, trouble_of
from qllava.llm.store import Call, Reply, Spent, Store

T = TypeVar("T")

RETRIES = 6
"""Number of attempts after the first. With the pauses between them a call survives an outage of a minute."""

_FIRST_REST = 1.0  # minimum seconds before the second attempt
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError, httpx.UnsupportedProtocol)


class Client:
    """Client of a server, with the store of its replies and a budget; used by one event loop, in `async with`."""

    def __init__(
        self,
        store: Store,
        base_url: str | None = None,
        *,
        concurrency: int = 16,
        timeout: float = 300.0,
        retries: int = RETRIES,
        max_calls: int | None = None,
        max_tokens: int | None = None,
        first_rest: float = _FIRST_REST,
    ) -> None:
        """Check address, key and proxy, without sending anything.

        Args:
            store: Store of the replies.
            base_url: Address of the server; None for OPENAI_BASE_URL, else OpenAI's own.
            concurrency: Number of requests at a time.
            timeout: Seconds without a byte from the server.
            retries: Number of attempts after the first.
            max_calls: Maximum number of requests, including those of earlier runs.
            max_tokens: Maximum number of tokens, including those of earlier runs.
            first_rest: Minimum seconds before the second attempt.

        Raises:
            InputError: The address, the key or the proxy cannot be used.
        """
        self.store = store
        self.concurrency = concurrency
        self._retries, self._first_rest = retries, first_rest
        self._budget = Budget(max_calls, max_tokens, store.requests, store.spent_tokens)
        self._address = address_of(base_url)
        self._clients = self._address.clients(concurrency, timeout)
        self._free: asyncio.LifoQueue[httpx.AsyncClient] = asyncio.LifoQueue()
        for client in connections_of(self._clients, concurrency):
            self._free.put_nowait(client)
        self._running: dict[str, asyncio.Task[Reply]] = {}  # by key, so that one call is in flight only once
        self._stopping = asyncio.Event()
        self._standing = Standing(self._address)
        self._resume = 0.0  # time, by the loop's clock, before which the server accepts no request
        self._error: BaseException | None = None

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self._clients:
            await client.aclose()

    async def each(
        self, items: Iterable[T], work: Callable[[T], Awaitable[None]], failed: Callable[[T, str], None]
    ) -> None:
        """Run `work`, which calls `ask`, on every item, `concurrency` at a time.

        An error of one item is passed to `failed`, and the others continue. At the end of the budget, an InputError of
        any `work`, or the first Ctrl-C, no new item is started; requests in flight are awaited and stored, because they
        are paid for. Then the error is raised; the end of the budget is not an error. A second Ctrl-C ends at once.

        Args:
            items: Items to work on.
            work: Function that asks about one item.
            failed: Called with an item that failed and the reason.
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
                except Exception as error:
                    failed(item, fault(error))
                if self._stopping.is_set():
                    return

        with self._catching_interrupts():
            async with asyncio.TaskGroup() as group:
                for _ in range(self.concurrency):
                    group.create_task(worker())
        if self._error is not None:
            raise self._error
        if not self._stopping.is_set():
            self._standing.at_the_end()

    async def ask(self, call: Call) -> Reply:
        """Return the reply to a call, from the store or from the server, whose reply is stored first.

        Raises:
            Unanswered: The call has no reply.
            Stopped: The budget is used up, or the run is being ended.
            InputError: No call can succeed.
        """
        kept = self.store.get(call.key)
        if kept is not None:
            return kept
        task = self._running.get(call.key)
        if task is None:
            task = self._running[call.key] = asyncio.create_task(self._ask(call))
            task.add_done_callback(lambda _: self._running.pop(call.key))
        return await task

    async def _ask(self, call: Call) -> Reply:
        if self._budget.max_tokens is not None:
            check_bounded(call)
        spent = Spent()
        before = self.store.failures(call.key) > 0
        try:
            reply = await self._attempts(call, spent)
        except Unanswered as error:
            await asyncio.to_thread(self.store.fail, call, str(error), spent)
            self._standing.failure(error, before=before)
            raise
        except (Stopped, InputError):
            if spent.requests:
                await asyncio.to_thread(self.store.fail, call, None, spent)
            raise
        self._standing.reply()
        await asyncio.to_thread(self.store.add, (call, reply), spent=spent)
        return reply

    def _stop(self, error: BaseException | None) -> None:
        self._error = self._error or error
        self._stopping.set()
        self._budget.end()

    async def _attempts(self, call: Call, spent: Spent) -> Reply:
        """Return a reply, after as many attempts as are allowed; raises the errors of `ask`."""
        content, tokens, loop = _content(call), most_tokens(call), asyncio.get_running_loop()

        async def attempt() -> Reply | Trouble:
            # Not all at the same moment, or the server would have to reject most of them again.
            await self._rest((self._resume - loop.time()) * random.uniform(1.0, 1.2))
            outcome = await self._once(call, content, tokens, spent)
            if isinstance(outcome, Trouble):
                if not outcome.passes:
                    raise Unanswered(outcome.reason, outcome.status)
                if outcome.wait is not None:
                    self._resume = max(self._resume, loop.time() + outcome.wait)
            return outcome

        patience = Patience(self._standing, self._retries, self._first_rest)
        return await patience.wait_for(attempt, self._rest)

    async def _once(self, call: Call, content: bytes, tokens: int, spent: Spent) -> Reply | Trouble:
        """Make one attempt within the budget, and count its cost; raises the errors of `ask`."""
        await self._budget.reserve(tokens)
        cost, sent, reply = tokens, True, None  # maximum values until the real ones are known
        try:
            response = await self._post(content)
            self._standing.heard = True
            if response.status_code == 200 and error_of(read_json(response.content)) is None:
                reply = read_reply(response.content, call)
                cost = reply.prompt_tokens + reply.completion_tokens
                return reply
            cost = 0
            return trouble_of(response, self._address)
        except httpx.RequestError as error:
            if isinstance(error, _NOT_SENT):
                cost, sent = 0, False
            reason = self._address.hidden(f"{type(error).__name__} ({error})" if str(error) else type(error).__name__)
            # Among many connections one may be refused; if the last one is refused too, nothing listens there.
            if isinstance(error, httpx.ConnectError) and not self._standing.heard and self._budget.open == 1:
                raise no_server(self._address, reason) from error
            return Trouble(reason)
        finally:
            self._budget.settle(tokens, cost, sent=sent)
            spent.requests += sent
            spent.lost_tokens += cost if reply is None else 0

    async def _post(self, content: bytes) -> httpx.Response:
        """Send a request over a free connection."""
        client = await self._free.get()
        try:
            return await client.post(self._address.url, content=content)
        finally:
            self._free.put_nowait(client)

    async def _rest(self, seconds: float) -> None:
        """Wait, and raise Stopped if the run is being ended, when nothing more may be sent."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), seconds)
        if self._stopping.is_set():
            raise Stopped

    @contextmanager
    def _catching_interrupts(self) -> Iterator[None]:
        """Make the first Ctrl-C stop the run in an orderly way; the second one interrupts as usual."""
        loop = asyncio.get_running_loop()

        def interrupt() -> None:
            loop.remove_signal_handler(signal.SIGINT)
            self._stop(KeyboardInterrupt())

        caught = False
        try:
            loop.add_signal_handler(signal.SIGINT, interrupt)
            caught = True
        except (RuntimeError, ValueError):  # only the main thread gets signals
            pass
        try:
            yield
        finally:
            if caught:
                loop.remove_signal_handler(signal.SIGINT)


def fault(error: Exception) -> str:
    """Return the reason for one item's failure: the server's message, or an error of this program."""
    return str(error) if isinstance(error, Unanswered) else f"fault: {type(error).__name__} ({error})"[:300]


def _content(call: Call) -> bytes:
    """Return the body of the request, or raise Unanswered for a text that no request can contain."""
    try:
        return json.dumps(call.body(), ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.start + 1]
        raise Unanswered(f"the text contains half a character ({half!a}), which cannot be sent") from error
    except (ValueError, RecursionError) as error:
        raise Unanswered(f"the request cannot be written as JSON ({error})") from error
