"""What stands between the browser and Gradio: who may read which file, how much may be sent, what a page may load.

Gradio keeps uploads under an address that follows from their content, and hands them to whoever asks for it. Here each
browser gets a cookie, each upload is moved at once into a folder of that cookie's owner, and a file is served only to
the owner of its folder:

    FOLDER/OWNER/uploads/RANDOM/photo.jpg     as it was sent, until its question is asked
    FOLDER/OWNER/SESSION/SHA256.png           as it was written anew, until its page is closed
    FOLDER/examples/colour.png                for everybody

FOLDER itself is a path of this machine, which is nobody's business: in what leaves the process a random name stands for
it, and in what arrives it is put back.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any

MAX_UPLOAD = 20 * 2**20
"""Bytes of a file."""
MAX_PICTURES = 8
"""With one question."""
MAX_MESSAGE = 2 * 2**20
"""Bytes of any other request."""
MAX_AGE = 3600
"""Seconds after which an upload that was never asked about is deleted."""
COOKIE = "qllava"
EXAMPLES = "examples"
# Whatever a model answers or a user pastes (markdown, <img src=...>), the browser loads nothing from elsewhere.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def owner_of(cookie: str | None) -> str | None:
    """The name of the folder of a cookie's owner, from which the cookie cannot be told."""
    return hashlib.sha256(cookie.encode()).hexdigest()[:32] if cookie else None


class Guard:
    """ASGI middleware around Gradio's application."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], folder: Path) -> None:
        self.app = app
        self.folder = folder.resolve()
        self.alias = f"/{secrets.token_hex(8)}"  # random: nobody can type it by accident

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what is refused; hand the rest on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        cookie = _cookie(headers.get("cookie", ""))
        new = None if cookie else secrets.token_urlsafe(24)
        inside, alias = str(self.folder), self.alias
        guarded = _Renamed(_with_headers(send, new), inside, alias).send
        path = scope["path"].replace(alias, inside)
        scope = {**scope, "path": path, "raw_path": scope["raw_path"].replace(alias.encode(), inside.encode())}
        uploading = path.endswith("/upload")
        limit = MAX_PICTURES * (MAX_UPLOAD + 10_000) if uploading else MAX_MESSAGE  # what a form adds to its files
        sent = headers.get("content-length", "0")
        if "chunked" in headers.get("transfer-encoding", "") or not sent.isdigit():
            return await _refuse(guarded, 411, "Say first how many bytes you send.")
        if int(sent) > limit:
            most = f"{MAX_PICTURES} pictures of {MAX_UPLOAD // 2**20} MB" if uploading else f"{MAX_MESSAGE // 2**20} MB"
            return await _refuse(guarded, 413, f"This is too large: at most {most}.")
        if "/deep_link" in path:  # Gradio would keep the conversation on disk, under an address for anybody
            return await _refuse(guarded, 403, "Conversations are not kept here.")
        file = _file_of(path)
        if file is not None and not self._may_read(file, owner_of(cookie)):
            return await _refuse(guarded, 403, "There is no such file, or it is not yours.")
        if uploading and scope["method"] == "POST":
            owner = owner_of(cookie)
            if owner is None:
                return await _refuse(guarded, 403, "Uploads need the cookie of this page; allow it, and load it again.")
            guarded = _Moved(guarded, self.folder / owner / "uploads").send
        elif scope["method"] == "POST":
            body = await _whole_body(receive)
            if self._names_others(body, owner_of(cookie)):
                return await _refuse(guarded, 403, "There is no such file, or it is not yours.")
            receive = _again(body.replace(alias.encode(), inside.encode()), receive)
        return await self.app(scope, receive, guarded)

    def _names_others(self, body: bytes, owner: str | None) -> bool:
        """Whether a message names a file that is not its sender's: Gradio would open it for whoever asks."""
        # A path as JSON spells it without escapes, from its own folder on, to the end of its string.
        mine = rb"/(?:%s|%s)/[^\"\\]*\"" % (re.escape((owner or EXAMPLES).encode()), EXAMPLES.encode())
        named = re.findall(re.escape(self.alias.encode()) + mine, body)
        clean = [path for path in named if b"/.." not in path]
        return len(clean) != body.count(self.alias.encode()) or str(self.folder).encode() in body

    def _may_read(self, file: str, owner: str | None) -> bool:
        try:
            path = (Path.cwd() / file).resolve()
            place = path.relative_to(self.folder).parts
        except (ValueError, OSError, RuntimeError):  # elsewhere, no path at all, or links in a circle
            return False
        return len(place) > 1 and place[0] in (owner, EXAMPLES) and path.is_file()


def _cookie(header: str) -> str | None:
    try:
        found = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return None
    return found.value if found is not None else None


def _file_of(path: str) -> str | None:
    """The file that an address asks Gradio for, None for other addresses."""
    for mark in ("/file=", "/file/"):
        _, found, file = path.partition(mark)
        if found:
            return file
    return None


def _with_headers(send: Send, cookie: str | None) -> Send:
    """`send`, with the policy on every answer, and a cookie for a browser that has none."""

    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            headers += [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
            if cookie is not None:
                value = f"{COOKIE}={cookie}; Path=/; HttpOnly; SameSite=Lax"
                headers.append((b"set-cookie", value.encode()))
            message = {**message, "headers": headers}
        await send(message)

    return with_headers


class _Renamed:
    """Answers in which one string stands for another: pages and JSON as a whole, streams event by event."""

    def __init__(self, send: Send, old: str, new: str) -> None:
        self._send = send
        self._old, self._new = old.encode(), new.encode()
        self._start: Message | None = None  # held back: its length is known at the end
        self._stream = self._as_it_is = False
        self._body = b""

    async def send(self, message: Message) -> None:
        """Pass on, renamed."""
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
    """All of a request's body; its length was checked before."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = bool(message.get("more_body"))
    return body


def _again(body: bytes, receive: Receive) -> Receive:
    """`receive` for a body that was taken already."""
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
    headers = [(b"content-type", b"application/json")]
    await _send_whole(send, {"type": "http.response.start", "status": status, "headers": headers}, body)


class _Moved:
    """Gradio's answer to an upload, a list of paths, with the files moved into their owner's folder."""

    def __init__(self, send: Send, folder: Path) -> None:
        self._send = send
        self._folder = folder
        self._start: Message | None = None
        self._body = b""

    async def send(self, message: Message) -> None:
        """Hold the answer back until it is whole."""
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._body += message.get("body", b"")
        if message.get("more_body") or self._start is None:
            return
        body = self._body
        if self._start["status"] == 200:
            found = list(dict.fromkeys(json.loads(body)))  # a picture that was sent twice is one file
            moved = {path: str(self._move(Path(path))) for path in found}
            body = json.dumps([moved[path] for path in json.loads(body)]).encode()
        await _send_whole(self._send, self._start, body)

    def _move(self, path: Path) -> Path:
        if self._folder.is_dir():
            for old in self._folder.iterdir():
                if time.time() - old.stat().st_mtime > MAX_AGE:
                    shutil.rmtree(old, ignore_errors=True)
        place = self._folder / secrets.token_hex(8)
        place.mkdir(parents=True)
        return path.rename(place / path.name)
