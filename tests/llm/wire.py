"""A server without a network, and a clock without waiting, for tests of many requests or of long outages.

    with Runner(loop_factory=QuickLoop) as runner: runner.run(...)     pauses end at once, in the right order

`Wire` replaces a connection: `monkeypatch.setattr(Client, "_post", Wire(answer).post)`.
"""

from __future__ import annotations

import asyncio
import json
import selectors
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx

from tests.llm.server import Request, Said, completion, key_of


class Wire:
    """Server in this process; `requests` are in the order of arrival, `times` by the loop's clock."""

    def __init__(self, answer: Callable[[Request], Said]) -> None:
        self.answer = answer
        self.asked: Counter[str] = Counter()
        self.requests: list[Request] = []
        self.times: list[float] = []

    async def post(self, content: bytes) -> httpx.Response:
        """Answer one request as a `ChatServer` does."""
        body = json.loads(content)
        request = Request(body, {}, self.asked[key_of(body)])
        self.asked[request.key] += 1
        self.requests.append(request)
        self.times.append(asyncio.get_running_loop().time())
        said = self.answer(request)
        await asyncio.sleep(said.seconds)
        if said.drop:
            raise httpx.ReadError("the connection broke")
        body_sent = completion(request, said) if said.body is None else said.body
        return httpx.Response(said.status, headers=said.headers, content=body_sent)


class QuickLoop(asyncio.SelectorEventLoop):
    """Event loop whose clock jumps to the next time at which something is due."""

    def __init__(self) -> None:
        self.ahead = 0.0
        super().__init__(_Jumping(self))

    def time(self) -> float:
        """Return the seconds of the loop's own clock."""
        return super().time() + self.ahead


class _Jumping(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """Selector that waits a moment for real events (of threads), and skips the rest of a timeout."""

    def __init__(self, loop: QuickLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        """Return events like the base class; a timeout only advances the loop's clock."""
        events = super().select(timeout if timeout is None else min(timeout, 0.0005))
        if not events and timeout is not None:
            self._loop.ahead += timeout
        return list(events)
