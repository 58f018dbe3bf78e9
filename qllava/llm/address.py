"""Address of a server, and its secrets, which must never be shown: the key, and a password in the address.

The key comes from the environment (OPENAI_API_KEY), and is used only in the header of requests. A password in the
address (`https://user:password@host/v1`) becomes that header too; the address that is stored, printed and logged does
not contain it.
"""

from __future__ import annotations

import os
import re
from base64 import b64encode
from dataclasses import dataclass, field
from urllib.parse import quote, unquote
from urllib.request import getproxies

import httpx

from qllava.config import InputError

OPENAI = "https://api.openai.com/v1"

_CONNECTIONS = 16  # maximum number of connections of one client
_USER = re.compile(r"//[^/?#\s]*@")  # user and password, before the host
_QUERY = re.compile(r"[?#]\S*")


@dataclass(frozen=True)
class Address:
    """Address of a server, with its secrets."""

    url: str
    """URL of /chat/completions, without user and password."""
    key: str = field(repr=False)
    """API key from the environment; empty if there is none."""
    login: tuple[str, str] | None = field(repr=False)
    """User and password from the address; None if it has none."""

    def hidden(self, text: str) -> str:
        """Return a text with the key and the password masked, which a server may repeat."""
        for secret, name in ((self.key, "(the key)"), *((form, "(the password)") for form in self._password())):
            text = text.replace(secret, name) if secret else text
        return _USER.sub("//***@", text)

    def _password(self) -> tuple[str, ...]:
        """Return the forms of the password: in the header, as it is, and quoted in an address."""
        if self.login is None:
            return ()
        return b64encode(":".join(self.login).encode()).decode(), self.login[1], quote(self.login[1], safe="")

    def clients(self, connections: int, timeout: float) -> list[httpx.AsyncClient]:
        """Open clients for a number of connections, each with a few, because a pool's work grows with its square.

        Args:
            connections: Total number of connections.
            timeout: Seconds without a byte from the server.

        Raises:
            InputError: The environment names a proxy that cannot be used.
        """
        certificates = httpx.create_ssl_context()
        headers = {"Content-Type": "application/json"}
        try:
            return [
                httpx.AsyncClient(
                    headers={**headers, **({"Authorization": f"Bearer {self.key}"} if self.key else {})},
                    auth=self.login,
                    timeout=httpx.Timeout(timeout, connect=min(timeout, 30.0), pool=None),
                    limits=httpx.Limits(max_connections=_CONNECTIONS, max_keepalive_connections=_CONNECTIONS),
                    verify=certificates,
                )
                for _ in range(0, connections, _CONNECTIONS)
            ]
        except (ImportError, ValueError, httpx.InvalidURL) as error:  # raised by httpx for a proxy
            raise InputError(_bad_proxy(error)) from error


def connections_of(clients: list[httpx.AsyncClient], connections: int) -> list[httpx.AsyncClient]:
    """Return a list with one client for each connection."""
    return [clients[number // _CONNECTIONS] for number in range(connections)]


def address_of(base_url: str | None) -> Address:
    """Return the address for requests: `base_url`, else OPENAI_BASE_URL, else OpenAI's.

    Raises:
        InputError: The address is invalid, or it is OpenAI's own and the key is missing, or the key is invalid.
    """
    key, given = _key(), chosen(base_url)
    try:
        url = httpx.URL(given)
        login = (unquote(url.username), unquote(url.password)) if url.userinfo else None
        plain = str(url.copy_with(userinfo=b"")).rstrip("/")
    except (httpx.InvalidURL, ValueError):  # an invalid port or host
        url, login, plain = httpx.URL(""), None, ""
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise InputError(
            f"{without_secrets(given)} is not the address of a server, which looks like http://127.0.0.1:8000/v1; "
            "correct it."
        )
    if plain == OPENAI and not key:
        raise InputError(f"{plain} needs a key: set OPENAI_API_KEY, or name another server with --base-url.")
    return Address(f"{plain}/chat/completions", key, login)


def chosen(base_url: str | None) -> str:
    """Return `base_url`, else OPENAI_BASE_URL, else OpenAI's, unchecked and with any secrets that it contains."""
    return (base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI).strip().rstrip("/")


def without_secrets(url: str) -> str:
    """Return an address that may be shown: without user, password, and the text after a question mark.

    The address may be invalid, without `//` or with a slash in its password: all before the last @ is hidden.

    >>> without_secrets("https://me:secret@host/v1?key=secret"), without_secrets("me:secret@host/v1")
    ('https://***@host/v1?***', '***@host/v1')
    """
    scheme, mark, rest = url.partition("//") if "//" in url.partition("@")[0] else ("", "", url)
    shown = f"{scheme}{mark}***@{rest.rpartition('@')[2]}" if "@" in rest else url
    return _QUERY.sub("?***", shown)


def _key() -> str:
    """Return the key, or "" if there is none; raise InputError, without the key, if it cannot be in a header."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and (key.isprintable() or not key)):
        raise InputError("OPENAI_API_KEY contains characters that cannot be part of an API key; copy the key again.")
    return key


def _bad_proxy(error: Exception) -> str:
    """Return the message about a proxy that httpx cannot use; the proxy's own address may contain a password."""
    proxies = {name: without_secrets(url) for name, url in getproxies().items() if name != "no"}
    named = ", ".join(f"{name}_proxy={url}" for name, url in sorted(proxies.items()))
    advice = "unset the variable, or name the server in NO_PROXY"
    if isinstance(error, ImportError):
        return f"The environment names a SOCKS proxy ({named}), which needs: pip install socksio; or {advice}."
    return f"The environment names a proxy that cannot be used ({named}); correct it, {advice}."
