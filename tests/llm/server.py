"""A server of /chat/completions over real HTTP for tests: it gives prepared answers and counts what was paid.

    with ChatServer(lambda request: Said("Hello.")) as server:
        Client(store, server.url)

The function gets the request, with the number of earlier requests with the same body, and returns what to do. A reply
counts as paid when it was completely sent with status 200.
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
    """Answer of the server to one request."""

    text: str | None = ""
    """Text of the reply, or message of the error."""
    status: int = 200
    """HTTP status."""
    finish_reason: str = "stop"
    """Finish reason of the reply."""
    refusal: str | None = None
    """Refusal of the reply."""
    seconds: float = 0.0
    """Delay of the answer."""
    headers: dict[str, str] = field(default_factory=dict)
    """Additional headers."""
    body: bytes | None = None
    """Body that is sent instead of a completion."""
    drop: bool = False
    """Whether the connection breaks in the middle of the answer."""


@dataclass(frozen=True)
class Request:
    """A request to the server."""

    body: dict[str, Any]
    """Body as JSON."""
    headers: dict[str, str]
    """Headers; names are in lower case."""
    before: int
    """Number of earlier requests with the same body."""

    @property
    def key(self) -> str:
        """A name for the content of the body."""
        return key_of(self.body)

    @property
    def last(self) -> str:
        """Content of the last message."""
        return str(self.body["messages"][-1]["content"])


def key_of(body: dict[str, Any]) -> str:
    """Return a name for a body, which is equal for equal content."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class ChatServer:
    """A server in a thread; `asked` and `paid` count bodies by their content.

    Args:
        answer: Function that returns the answer to a request.
        limit: Number of requests that are answered at a time; others wait. None: no limit.
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
        """Stop the server at once, even with open connections."""
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
        """Answer one request; return False if the connection must be closed."""
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
    """Return the body of an answer in the protocol; tokens are counted as words."""
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
