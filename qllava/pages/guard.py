"""Filter between the browser and Gradio: access to files, sizes of requests, and what a page may load.

Gradio stores uploads under an address that follows from their content, and serves them to anyone who asks. Here each
browser gets a cookie, uploads are handled by `uploads.py` instead of Gradio, and a file is served only to the owner of
its folder:

    FOLDER/OWNER/uploads/RANDOM/SHA256.png    the pixels of an upload, until its question is asked or its page is closed
    FOLDER/OWNER/page-SESSION/SHA256.png      the pixels of a question's image, until its page is closed
    FOLDER/examples/colour.png                for everybody

FOLDER is a local path, which must not be published: it is replaced by a random name in everything that leaves the
process, and restored in everything that arrives.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

from starlette.requests import ClientDisconnect, Request

from qllava.config import InputError
from qllava.pages.access import MAX_NEW, Cookies, Hosts
from qllava.pages.uploads import EXAMPLES, MAX_IMAGES, MAX_UPLOAD, TooMuch, Uploads

MAX_MESSAGE = 2 * 2**20
"""Maximum bytes of a request other than an upload."""
# Whatever a model answers or a user pastes (markdown, <img src=...>), the browser loads nothing from other servers.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """ASGI middleware around Gradio's application."""

    def __init__(
        self, app: Callable[[Scope, Receive, Send], Awaitable[None]], uploads: Uploads, cookies: Cookies, hosts: Hosts
    ) -> None:
        self.app = app
        self.uploads = uploads
        self.cookies = cookies
        self.hosts = hosts
        self.folder = uploads.folder
        self.alias = f"/{secrets.token_hex(8)}"  # random, so that nobody types it by accident

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer requests that are refused, and pass on the others."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # a websocket; the page opens none
            return await send({"type": "websocket.close", "code": 1008})
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        owner, new = self.cookies.owner(headers.get("cookie")), None
        path = scope["path"].replace(self.alias, str(self.folder))
        raw = scope["raw_path"].replace(self.alias.encode(), str(self.folder).encode())
        scope = {**scope, "path": path, "raw_path": raw}
        refusal = self.hosts.refuses(headers)
        if refusal is None and owner is None and path == "/":
            new = self.cookies.issue()
        guarded = _Renamed(_with_headers(send, self.cookies.name, new), str(self.folder), self.alias).send
        if refusal is not None:
            return await _refuse(guarded, 421 if "served as" in refusal else 403, refusal)
        if owner is None and new is None and path == "/":
            return await _refuse(
                guarded, 429, f"There were more than {MAX_NEW} new visitors in a minute. Try again soon."
            )
        refused = self._refused(scope, headers, owner)
        if refused is not None:
            return await _refuse(guarded, *refused)
        await self._hand_on(scope, receive, guarded, headers, owner)

    def _refused(self, scope: Scope, headers: dict[str, str], owner: str | None) -> tuple[int, str] | None:
        """Return status and reason of a request that is refused without reading its body; None if it is accepted."""
        path = scope["path"]
        uploading = path.endswith("/upload")
        limit = MAX_IMAGES * (MAX_UPLOAD + 10_000) if uploading else MAX_MESSAGE  # a form has bytes besides its files
        sent = headers.get("content-length", "0")
        if "chunked" in headers.get("transfer-encoding", "") or not sent.isdigit():
            return 411, "The request has no Content-Length."
        if int(sent) > limit:
            most = f"{MAX_IMAGES} images of {MAX_UPLOAD // 2**20} MB" if uploading else f"{MAX_MESSAGE // 2**20} MB"
            return 413, f"The request is too large. The limit is {most}."
        if "/deep_link" in path:  # Gradio would store the conversation on disk, under an address open to everyone
            return 403, "Links to conversations are not available."
        file = _file_of(path)
        if file is not None and not self._may_read(file, owner):
            return 403, "This file does not exist, or belongs to another visitor."
        if owner is None and uploading:
            return 403, "Uploads need the cookie of this page. Allow cookies and reload the page."
        return None

    async def _hand_on(
        self, scope: Scope, receive: Receive, send: Send, headers: dict[str, str], owner: str | None
    ) -> None:
        path = scope["path"]
        if owner is not None and path.endswith("/upload") and scope["method"] == "POST":
            return await self._take_in(scope, receive, send, owner, int(headers.get("content-length", "0")))
        if path.endswith("/upload_progress"):  # Gradio knows no upload, and would search for it for seconds
            return await _send_whole(send, _start(200, "text/event-stream"), b'data: {"msg": "done"}\n\n')
        if owner is not None and "/heartbeat/" in path:
            page = self.uploads.opened(owner, path.rpartition("/")[2])
            try:
                return await self.app(scope, receive, send)
            finally:
                self.uploads.closed(page)
        if scope["method"] == "POST":
            body = await _whole_body(receive)
            if self._names_others(body, owner):
                return await _refuse(send, 403, "This file does not exist, or belongs to another visitor.")
            receive = _again(body.replace(self.alias.encode(), str(self.folder).encode()), receive)
        return await self.app(scope, receive, send)

    async def _take_in(self, scope: Scope, receive: Receive, send: Send, owner: str, size: int) -> None:
        """Answer an upload as Gradio would: with the paths of the files, in order."""
        if not await self._logged_in(scope):
            return await _refuse(send, 401, "Log in first.")
        try:
            kept = await self.uploads.receive(owner, Request(scope, receive), size)
        except ClientDisconnect:
            return None
        except InputError as error:  # the page shows the body unchanged
            status = 413 if isinstance(error, TooMuch) else 422
            return await _send_whole(send, _start(status, "text/plain; charset=utf-8"), str(error).encode())
        body = json.dumps([str(path) for path in kept]).encode()
        return await _send_whole(send, _start(200, "application/json"), body)

    async def _logged_in(self, scope: Scope) -> bool:
        """Return whether Gradio admits this visitor under `--auth`; without it everyone is admitted."""
        status: list[int] = []

        async def heard(message: Message) -> None:
            if message["type"] == "http.response.start":
                status.append(message["status"])

        async def nothing() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        asked = "/gradio_api/login_check"
        await self.app({**scope, "method": "GET", "path": asked, "raw_path": asked.encode()}, nothing, heard)
        return status == [200]

    def _names_others(self, body: bytes, owner: str | None) -> bool:
        """Return whether a message names a file of another visitor, which Gradio would open for any sender.

        A file is a path in this process; Gradio would also download from an address, and store the result.
        """
        # A path as unescaped JSON, from its own folder on, to the end of its string.
        mine = rb"/(?:%s|%s)/[^\"\\]*\"" % (re.escape((owner or EXAMPLES).encode()), EXAMPLES.encode())
        named = re.findall(re.escape(self.alias.encode()) + mine, body)
        clean = [path for path in named if b"/.." not in path]
        if len(clean) != body.count(self.alias.encode()) or str(self.folder).encode() in body:
            return True
        return any(not path.startswith(f"{self.alias}/") for path in _paths(body))

    def _may_read(self, file: str, owner: str | None) -> bool:
        try:
            path = (Path.cwd() / file).resolve()
            place = path.relative_to(self.folder).parts
        except (ValueError, OSError, RuntimeError):  # outside the folder, not a path, or links in a circle
            return False
        return len(place) > 1 and place[0] in (owner, EXAMPLES) and path.is_file()


def _paths(body: bytes) -> Iterator[str]:
    """Yield the values of all keys `path` in a JSON message."""
    try:
        waiting = [json.loads(body)]
    except (ValueError, RecursionError):  # a form, or something that Gradio cannot read either
        return
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if isinstance(value.get("path"), str):
                yield value["path"]
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _file_of(path: str) -> str | None:
    """Return the file that an address requests from Gradio; None for other addresses."""
    for mark in ("/file=", "/file/"):
        _, found, file = path.partition(mark)
        if found:
            return file
    return None


def _with_headers(send: Send, name: str, cookie: str | None) -> Send:
    """Return `send` that adds the policy to every answer, and a cookie for a browser that has none."""

    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            headers += [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
            if cookie is not None:
                value = f"{name}={cookie}; Path=/; HttpOnly; SameSite=Lax"
                headers.append((b"set-cookie", value.encode()))
            message = {**message, "headers": headers}
        await send(message)

    return with_headers


class _Renamed:
    """Replaces one string in answers: pages and JSON as a whole, streams event by event."""

    def __init__(self, send: Send, old: str, new: str) -> None:
        self._send = send
        self._old, self._new = old.encode(), new.encode()
        self._start: Message | None = None  # delayed, because the length is known at the end
        self._stream = self._as_it_is = False
        self._body = b""

    async def send(self, message: Message) -> None:
        """Send a message with the string replaced."""
        if message["type"] == "http.response.start":
            kind = next((value for name, value in message["headers"] if name.lower() == b"content-type"), b"")
            self._stream = kind.startswith(b"text/event-stream")
            self._as_it_is = not self._stream and not kind.startswith((b"application/json", b"text/html"))
            self._start = message
            if self._stream or self._as_it_is:
                await self._send(message)
        elif self._as_it_is or self._start is None or message["type"] != "http.response.body":
            await self._send(message)
        elif self._stream:
            await self._send({**message, "body": message.get("body", b"").replace(self._old, self._new)})
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await _send_whole(self._send, self._start, self._body.replace(self._old, self._new))


async def _whole_body(receive: Receive) -> bytes:
    """Read the whole body of a request, whose length was checked before."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = bool(message.get("more_body"))
    return body


def _again(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` for a body that was read already."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return waiting.pop() if waiting else await receive()

    return receive_again


async def _send_whole(send: Send, start: Message, body: bytes) -> None:
    kept = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
    await send({**start, "headers": [*kept, (b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})


async def _refuse(send: Send, status: int, reason: str) -> None:
    body = json.dumps({"detail": reason}).encode()
    await _send_whole(send, _start(status, "application/json"), body)


def _start(status: int, kind: str) -> Message:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind.encode())]}
