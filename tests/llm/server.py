"""A server of /chat/completions over real HTTP, for tests: it says what it is told to, and counts what was paid.

    with ChatServer(lambda request: Said("Hello.")) as server:
        Client(store, server.url)

The function gets the body of the request and how often the same body came before, and returns what to do. A reply is
paid when its last byte was handed to the network with status 200.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any


@dataclass(frozen=True)
class Said:
    """What the server does with one request."""

    text: str | None = ""
    status: int = 200
    finish_reason: str = "stop"
    refusal: str | None = None
    seconds: float = 0.0  # before it answers
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None  # sent in place of a completion
    drop: bool = False  # the connection breaks in the middle of the answer


@dataclass(frozen=True)
class Request:
    """What the server was asked."""

    body: dict[str, Any]
    headers: dict[str, str]  # names in lower case
    before: int  # how often the same body came before

    @property
    def key(self) -> str:
        """The content as a name."""
        return key_of(self.body)

    @property
    def last(self) -> str:
        """The last message."""
        return str(self.body["messages"][-1]["content"])


def key_of(body: dict[str, Any]) -> str:
    """A body as a name: equal for equal content."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class ChatServer:
    """A server in a thread; `asked` and `paid` count bodies by their content.

    limit: how many requests are worked on at a time; the others wait in line.
    """

    def __init__(self, answer: Callable[[Request], Said], *, limit: int | None = None) -> None:
        self.answer = answer
        self.limit = limit
        self.asked: Counter[str] = Counter()
        self.paid: Counter[str] = Counter()
        self.requests: list[Request] = []
        self.busy = self.most_busy = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    @property
    def url(self) -> str:
        """The base URL for a client."""
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> ChatServer:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()
        self._thread.join(10)

    def leave(self) -> None:
        """End at once, whoever is connected."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end.set)

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        self._slots = asyncio.Semaphore(self.limit or 100_000)
        self._open: set[asyncio.StreamWriter] = set()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=2048)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._end.wait()
        server.close()
        for writer in self._open:
            writer.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client went away
        finally:
            self._open.discard(writer)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; False when the connection is to be closed."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))) or b"{}")
        if not head[0].startswith("POST /v1/chat/completions "):
            said = Said(status=404, body=b'{"error": {"message": "no such path"}}')
            request = Request(body, headers, 0)
        else:
            key = key_of(body)
            request = Request(body, headers, self.asked[key])
            self.asked[key] += 1
            self.requests.append(request)
            said = self.answer(request)
        async with self._slots:
            self.busy += 1
            self.most_busy = max(self.busy, self.most_busy)
            await asyncio.sleep(said.seconds)
            self.busy -= 1
        content = said.body if said.body is not None else completion(request, said)
        lines = {"content-type": "application/json", "content-length": str(len(content)), **said.headers}
        start = f"HTTP/1.1 {said.status} Said\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()) + "\r\n"
        if said.drop:
            writer.write(start.encode() + content[: len(content) // 2])
            return False
        writer.write(start.encode() + content)
        await writer.drain()
        if said.status == 200:
            self.paid[request.key] += 1
        return True


def completion(request: Request, said: Said) -> bytes:
    """A body of the protocol; tokens are counted as words."""
    if said.status != 200:
        return json.dumps({"error": {"message": said.text, "type": "test"}}).encode()
    asked = sum(len(str(message["content"]).split()) for message in request.body["messages"])
    spoken = len((said.text or "").split())
    message = {"role": "assistant", "content": said.text, **({"refusal": said.refusal} if said.refusal else {})}
    return json.dumps(
        {
            "id": f"chatcmpl-{request.key[:8]}",
            "object": "chat.completion",
            "model": request.body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": said.finish_reason}],
            "usage": {"prompt_tokens": asked, "completion_tokens": spoken, "total_tokens": asked + spoken},
        }
    ).encode()
