"""Identification of requests: the cookie of a visitor, the address in the browser, and the page that sends.

Cookies are not separated by port: any other server on 127.0.0.1 can set cookies that reach this process, under any
name, and reads those that it sets. So the name of the cookie is random for each process, only values signed by this
process are accepted, and a header is searched for them value by value.

A page of another site can make its own name resolve to 127.0.0.1 (DNS rebinding), and its script then reaches this
process as if it were on the same site. The `Host` header contains the name that the browser uses.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

MAX_NEW = 120
"""Maximum number of new visitors per minute."""


class Cookies:
    """The cookies of this process.

    Args:
        now: Clock, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.name = f"qllava-{secrets.token_hex(4)}"
        self._key = secrets.token_bytes(32)
        self._now = now
        self._issued: deque[float] = deque()

    def issue(self) -> str | None:
        """Return the value for a new visitor; None if there were `MAX_NEW` in the last minute."""
        while self._issued and self._now() - self._issued[0] > 60:
            self._issued.popleft()
        if len(self._issued) >= MAX_NEW:
            return None
        self._issued.append(self._now())
        token = secrets.token_hex(16)
        return f"{token}.{self._sign(token)}"

    def owner(self, header: str | None) -> str | None:
        """Return the folder name of the visitor who sends a `Cookie` header; the cookie cannot be derived from it."""
        for part in (header or "").split(";"):
            name, _, value = part.strip().partition("=")
            token, _, signature = value.partition(".")
            if name == self.name and hmac.compare_digest(signature.encode(), self._sign(token).encode()):
                return hashlib.sha256(value.encode()).hexdigest()[:32]
        return None

    def _sign(self, token: str) -> str:
        return hmac.new(self._key, token.encode(), hashlib.sha256).hexdigest()


class Hosts:
    """The addresses under which this page is served."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._shared: str | None = None

    def share(self, address: str) -> None:
        """Accept the host of a public address (`https://name.example`) too."""
        self._shared = urlsplit(address).netloc.lower()

    def refuses(self, headers: Mapping[str, str]) -> str | None:
        """Return why a request is refused, None if it is accepted; names of headers are in lower case."""
        local = (f"127.0.0.1:{self.port}", f"localhost:{self.port}")
        host = headers.get("host", "").lower()
        if host not in local and (self._shared is None or host != self._shared):
            return (
                f"This page is only served as http://127.0.0.1:{self.port}. Open that address. "
                "If you forward a port, use the same port number on both sides."
            )
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        if origin is not None:
            ours = [f"http://{name}" for name in local]
            ours += [f"https://{self._shared}", f"http://{self._shared}"] if self._shared else []
            if origin.lower() not in ours:
                return "Requests from pages of other sites are not accepted."
        return (
            None
            if origin is not None or site in ("none", "same-origin")
            else "Requests from other sites are not accepted."
        )
